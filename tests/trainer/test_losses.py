"""Losses against slow loops and closed forms."""

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from trainer.losses import dice_loss, nce_loss, segmentation_loss


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
