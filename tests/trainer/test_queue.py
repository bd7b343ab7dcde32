"""The queue of negatives, alone and inside PCRL's step."""

import copy

import pytest
import torch

from trainer.methods.queue import NO_SCAN, Queue

PRESETS = ("paper", "official", "recommended")


def test_it_holds_the_last_vectors_pushed_and_wraps_round() -> None:
    queue = Queue(5, 3)
    rows = torch.arange(8.0)[:, None].expand(8, 3)

    queue.push(rows[:3], torch.arange(3))
    queue.push(rows[3:8], torch.arange(3, 8))

    assert queue.vectors[:, 0].tolist() == [5, 6, 7, 3, 4]
    assert queue.scans.tolist() == [5, 6, 7, 3, 4]
    assert int(queue.pointer) == 3


def test_a_new_queue_is_full_of_unit_vectors_of_no_scan() -> None:
    queue = Queue(64, 8)

    torch.testing.assert_close(queue.vectors.norm(dim=1), torch.ones(64))
    assert (queue.scans == NO_SCAN).all()
    assert not queue.is_of(torch.arange(4)).any()


def test_same_scan_is_told_for_each_sample_and_place() -> None:
    queue = Queue(4, 2)

    queue.push(torch.zeros(3, 2), torch.tensor([7, 8, 7]))

    expected = [[True, False, True, False], [False, True, False, False]]
    assert queue.is_of(torch.tensor([7, 8])).tolist() == expected


def test_what_it_would_be_after_a_push_is_what_it_is_then() -> None:
    queue = Queue(5, 2)
    queue.push(torch.rand(4, 2), torch.zeros(4, dtype=torch.long))
    before, vectors = queue.vectors.clone(), torch.rand(3, 2)

    ahead = queue.with_pushed(vectors)

    assert torch.equal(queue.vectors, before)
    queue.push(vectors, torch.zeros(3, dtype=torch.long))
    assert torch.equal(queue.vectors, ahead) and not torch.equal(ahead, before)


def test_the_pointer_survives_a_checkpoint() -> None:
    queue, other = Queue(5, 2), Queue(5, 2)
    queue.push(torch.rand(3, 2), torch.arange(3))

    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    for each in (queue, other):
        each.push(torch.ones(3, 2), torch.ones(3, dtype=torch.long))

    forgetful = Queue(5, 2)
    forgetful.load_state_dict({**queue.state_dict(), "pointer": torch.tensor(0)})
    assert torch.equal(other.vectors, queue.vectors) and int(other.pointer) == 1
    forgetful.push(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    queue.push(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    assert not torch.equal(forgetful.vectors, queue.vectors)


@pytest.mark.parametrize("preset", PRESETS)
def test_after_n_steps_it_holds_the_last_vectors_of_unit_length(build, preset: str) -> None:
    method, views_of = build(preset=preset)
    size, expected = len(method.queue.vectors), method.queue.vectors.clone()
    pushed = []

    for step in range(1, 12):
        before = method.queue.vectors.clone()
        losses = method.losses(views_of(step))
        assert torch.equal(method.queue.vectors, before)  # the loss never writes to the queue
        method.update(losses)
        pushed.append(losses.pushed)

    everything = torch.cat(pushed)
    for at, vector in enumerate(everything):
        expected[at % size] = vector
    assert len(everything) > size
    assert torch.equal(method.queue.vectors, expected)
    assert int(method.queue.pointer) == len(everything) % size
    torch.testing.assert_close(method.queue.vectors.norm(dim=1), torch.ones(size))
    assert set(method.queue.scans.tolist()) == {0, 1}


@pytest.mark.parametrize("fields", [{"preset": p} for p in ("paper", "recommended")])
@pytest.mark.parametrize("push_when", ["after_step", "each_term"])
def test_one_term_never_sees_vectors_of_its_own_step(build, fields, push_when: str) -> None:
    """Whatever is pushed and wherever the pointer is, the loss is of the queue before the step."""
    method, views_of = build(**fields, push_when=push_when)
    views = views_of(1)

    first = method.losses(views).contrast
    method.queue.pointer.fill_(17)
    again = method.losses(views).contrast

    assert torch.equal(first, again)
    method.update(method.losses(views))
    assert not torch.equal(method.losses(views).contrast, first)  # a later step sees them


@pytest.mark.parametrize(("push_when", "sees"), [("after_step", False), ("each_term", True)])
def test_later_terms_see_the_steps_own_keys_only_in_the_official_order(
    build, push_when: str, sees: bool
) -> None:
    """Bug B3: which vectors a step's keys would overwrite matters only to who sees them."""
    method, views_of = build(preset="official", push_when=push_when)
    views = views_of(1)

    first = method.losses(views).contrast
    method.queue.pointer.fill_(17)
    again = method.losses(views).contrast

    assert torch.equal(first, again) != sees
