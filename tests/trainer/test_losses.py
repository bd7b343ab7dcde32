"""Losses against slow loops and closed forms."""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from trainer.losses import (
    binary_nce_loss,
    dice_loss,
    mean_candidate,
    nce_loss,
    segmentation_loss,
)


def test_nce_equals_the_slow_loop() -> None:
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 5), dim=1) for n in (3, 3, 7))
    total = 0.0
    for b in range(3):
        positive = math.exp(float(query[b] @ key[b]) / 0.2)
        negatives = sum(math.exp(float(query[b] @ k) / 0.2) for k in queue)
        total -= math.log(positive / (positive + negatives))

    loss = nce_loss(query, key, queue, 0.2)

    assert abs(float(loss) - total / 3) < 1e-5


def test_nce_of_equal_vectors_is_the_log_of_all_candidates() -> None:
    same = F.normalize(torch.ones(2, 4), dim=1)

    loss = nce_loss(same, same, same[:1].expand(9, 4), 0.2)

    assert abs(float(loss) - math.log(10)) < 1e-6


def test_nce_with_the_positive_in_the_denominator_is_never_negative() -> None:
    query = torch.tensor([[1.0, 0.0]])
    opposite = torch.tensor([[-1.0, 0.0]])

    loss = nce_loss(query, query, opposite, 0.2)
    without = -math.log(math.exp(5) / math.exp(-5))  # Eq. 7 as printed

    assert 0 <= float(loss) < 1e-4
    assert without < 0


def test_ignored_negatives_count_for_nothing() -> None:
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 5), dim=1) for n in (3, 3, 7))
    ignored = torch.zeros(3, 7, dtype=torch.bool)
    ignored[:, 4:] = True
    one = torch.tensor(1.0)

    without = nce_loss(query, key, queue[:4], 0.2)
    binary = binary_nce_loss(query, key, queue, 0.2, one, ignored=ignored)

    torch.testing.assert_close(nce_loss(query, key, queue, 0.2, ignored=ignored), without)
    assert float(nce_loss(query, key, queue, 0.2)) > float(without)
    assert float(binary) < float(binary_nce_loss(query, key, queue, 0.2, one))


def test_binary_nce_equals_the_slow_loop() -> None:
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 5), dim=1) for n in (3, 3, 7))
    z, count, total = 1.7, 7, 0.0
    for b in range(3):
        x = math.exp(float(query[b] @ key[b]) / 0.2) / z
        total -= math.log(x / (x + count))
        for k in queue:
            x = math.exp(float(query[b] @ k) / 0.2) / z
            total -= math.log(count / (x + count))

    loss = binary_nce_loss(query, key, queue, 0.2, torch.tensor(z))

    assert abs(float(loss) - total / 3) < 1e-4
    assert abs(float(binary_nce_loss(query, key, queue, 0.2, torch.tensor(1.0))) - total / 3) > 0.1


def test_binary_nce_with_a_frozen_normaliser_has_the_values_of_bug_b1() -> None:
    """Z of a random queue, 1.10: the negatives' part grows with their cosine from 0.9 to 134."""
    query = torch.tensor([[1.0, 0.0]])
    parts = []
    for cosine in (0.0, 0.6, 1.0):
        negative = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]]).expand(16384, 2)
        parts.append(float(binary_nce_loss(query, query, negative, 0.2, torch.tensor(1.10))) - 4.8)

    assert [round(part, 0) for part in parts] == [1, 18, 134]


def test_the_mean_candidate_counts_the_key_and_the_queue() -> None:
    query = torch.tensor([[1.0, 0.0]])
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])

    mean = mean_candidate(query, query, queue, 0.5)

    assert abs(float(mean) - (math.exp(2) + 1 + math.exp(-2)) / 3) < 1e-5


def test_contrast_is_computed_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 32), dim=1) for n in (4, 4, 64))

    with torch.autocast("cpu", torch.bfloat16):
        loss = nce_loss(query, key, queue, 0.2)
        product = query @ queue.T

    assert torch.equal(loss, nce_loss(query, key, queue, 0.2))
    assert product.dtype == torch.bfloat16  # what the loss would have been made of


def test_dice_equals_the_slow_loop() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4, 4), torch.randint(3, (2, 4, 4, 4))
    probability = logits.softmax(dim=1)
    expected = 0.0
    for c in (1, 2):
        overlap = float(probability[:, c][target == c].sum())
        size = float(probability[:, c].sum()) + int((target == c).sum())
        expected += (1 - (2 * overlap + 1e-5) / (size + 1e-5)) / 2

    assert abs(float(dice_loss(logits, target)) - expected) < 1e-5


def test_a_perfect_segmentation_costs_nothing_and_a_wrong_one_does() -> None:
    target = torch.randint(3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    sure = 50.0 * F.one_hot(target, 3).movedim(-1, 1).float()

    assert float(segmentation_loss(sure, target)) < 1e-5
    assert float(segmentation_loss(sure.flip(1), target)) > 1


def test_class_weights_count_voxels_of_a_class_that_often() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4, 4), torch.randint(3, (2, 4, 4, 4))
    weights = torch.tensor([1.0, 1.0, 3.0])
    each = F.cross_entropy(logits, target, reduction="none")
    times = weights[target]
    expected = dice_loss(logits, target) + (each * times).sum() / times.sum()

    weighted = segmentation_loss(logits, target, weights)

    torch.testing.assert_close(weighted, expected)
    assert not torch.isclose(weighted, segmentation_loss(logits, target))
