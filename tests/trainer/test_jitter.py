"""Blocks and jitter: cutting, putting together, shifting."""

import torch

from trainer.data import blocks, jitter


def views() -> torch.Tensor:
    return 1 + torch.arange(3 * 8 * 8 * 4, dtype=torch.float32).reshape(3, 1, 8, 8, 4)


def test_blocks_are_counted_with_i_slowest_and_come_together_again() -> None:
    cut = blocks.split(views(), 4)

    assert cut.shape == (3, 4, 4, 4, 4)
    assert torch.equal(cut[2, 1], views()[2, 0, :4, 4:, :])
    assert torch.equal(cut[2, 2], views()[2, 0, 4:, :4, :])
    assert torch.equal(blocks.join(cut, (8, 8, 4)), views())


def test_a_view_is_flipped_cut_and_put_in_the_middle_of_zeros() -> None:
    drawn = jitter.draw(3, (8, 8, 4), 0.75, 0.5, torch.Generator().manual_seed(1))

    out = jitter.apply(views(), drawn, 0.75)

    for b in range(3):
        flipped = views()[b, 0].flip(0) if drawn.flips[b] else views()[b, 0]
        i, j, k = drawn.start[b].tolist()
        expected = torch.zeros(8, 8, 4)
        expected[1:7, 1:7, :3] = flipped[i : i + 6, j : j + 6, k : k + 3]
        assert torch.equal(out[b, 0], expected)
    assert drawn.flips.any() and not drawn.flips.all()


def test_the_kept_part_begins_anywhere_that_it_fits() -> None:
    drawn = jitter.draw(500, (8, 8, 4), 0.75, 0.5, torch.Generator().manual_seed(1))

    for axis, room in enumerate((2, 2, 1)):
        assert set(drawn.start[:, axis].tolist()) == set(range(room + 1))


def test_keeping_all_without_flips_changes_nothing() -> None:
    drawn = jitter.draw(3, (8, 8, 4), 1.0, 0.0, torch.Generator())

    assert torch.equal(jitter.apply(views(), drawn, 1.0), views())
