"""3D-CPC's pyramids and losses, and the Wasserstein game, against slow definitions."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from models.networks.critic3d import Critic3d
from models.networks.predictive import PatchPredictor, pyramids
from trainer.methods import adversarial, prediction

F_ROWS, M, E = 2, 5, 3


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    predicted, truth = torch.randn(2, F_ROWS, M, E, generator=torch.Generator().manual_seed(0))
    return predicted, truth


def test_the_context_of_a_column_is_ten_patches_of_which_the_last_is_its_own() -> None:
    reads = pyramids((4, 4, 4), 2)

    assert reads.shape == (16, 10)
    for j in range(4):
        for k in range(4):
            expected = [
                (0 * 4 + min(max(j + dj, 0), 3)) * 4 + min(max(k + dk, 0), 3)
                for dj in (-1, 0, 1)
                for dk in (-1, 0, 1)
            ]
            assert reads[j * 4 + k].tolist() == [*expected, (1 * 4 + j) * 4 + k]


def test_predictions_come_from_the_rows_seen_and_truth_from_those_to_come() -> None:
    torch.manual_seed(0)
    heads = PatchPredictor(8, (4, 2, 1), code_size=E, context_size=4, context_rows=2, future_rows=2)
    bottlenecks = torch.randn(3 * 8, 1, 2, 2, 2)

    predicted, truth = heads(bottlenecks)
    codes = heads.code(bottlenecks.flatten(1)).reshape(3, 4, 2, E)
    changed = bottlenecks.reshape(3, 4, 2, 8).clone()
    changed[:, 2:] += 1.0
    predicted_again, truth_again = heads(changed.reshape(24, 8))

    for row in range(2):
        for b in range(3):
            for column in range(2):
                torch.testing.assert_close(truth[row, b * 2 + column], codes[b, 2 + row, column])
    assert torch.equal(predicted_again, predicted)
    assert not torch.equal(truth_again, truth)


def test_info_nce_equals_a_loop_over_rows_and_columns() -> None:
    predicted, truth = drawn()

    loss = prediction.info_nce_loss(predicted, truth)

    slow = []
    for f in range(F_ROWS):
        for m in range(M):
            logits = torch.stack([predicted[f, m] @ truth[f, n] for n in range(M)])
            slow.append(cross_entropy(logits[None], torch.tensor([m])))
    torch.testing.assert_close(loss, torch.stack(slow).mean())


def test_the_binary_loss_equals_a_loop_and_is_log_two_without_any_score() -> None:
    predicted, truth = drawn()
    negative = torch.tensor([1, 2, 0, 4, 3])

    loss = prediction.pair_loss(predicted, truth, negative)

    slow = 0.0
    for m in range(M):
        for n, sign in ((m, -1.0), (int(negative[m]), 1.0)):
            score = sum(
                float(predicted[f, m, e] * truth[f, n, e]) for f in range(F_ROWS) for e in range(E)
            )
            slow += math.log1p(math.exp(sign * score / (F_ROWS * E)))
    assert float(loss) == pytest.approx(slow / (2 * M), rel=1e-5)
    nothing = prediction.pair_loss(torch.zeros_like(predicted), truth, negative)
    assert float(nothing) == pytest.approx(math.log(2))


def test_no_column_is_its_own_negative_and_every_other_one_may_be() -> None:
    random = torch.Generator().manual_seed(0)
    draws = torch.stack([prediction.draw_negatives(4, random) for _ in range(200)])

    for column in range(4):
        assert set(draws[:, column].tolist()) == set(range(4)) - {column}


def test_a_linear_critic_has_the_penalty_of_its_slope() -> None:
    slope = torch.full((1, 1, 2, 2, 2), 0.5)  # of norm sqrt(8) / 2

    def critic(volume: torch.Tensor, disarranged: torch.Tensor) -> torch.Tensor:
        return (slope * volume).flatten(1).sum(dim=1)

    truth, restored, other = torch.rand(3, 4, 1, 2, 2, 2, generator=torch.Generator())
    share = torch.rand(4)

    loss = adversarial.critic_loss(critic, truth, restored, other, share=share, penalty_weight=10.0)

    gap = critic(restored, other).mean() - critic(truth, other).mean()
    penalty = 10.0 * (math.sqrt(8) / 2 - 1) ** 2
    torch.testing.assert_close(loss, gap + penalty)
    torch.testing.assert_close(
        adversarial.generator_loss(critic, restored, other), -critic(restored, other).mean()
    )


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_the_penalty_is_that_of_single_gradients_and_moves_the_critic(norm) -> None:
    torch.manual_seed(0)
    critic = Critic3d(2, norm)
    truth, restored, other = torch.rand(3, 3, 1, 16, 16, 16)
    share = torch.rand(3)

    penalty = adversarial.gradient_penalty(critic, truth, restored, other, share)
    penalty.backward()

    assert critic(truth, other).shape == (3,)
    assert all(conv.weight.grad.abs().sum() > 0 for conv in critic.convs)
    if norm == "batch":
        return  # its scores depend on the whole batch
    slow = []
    for b in range(3):
        between = (share[b] * truth[b] + (1 - share[b]) * restored[b])[None].requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between, other[b : b + 1]).sum(), between)
        slow.append((gradient.norm() - 1) ** 2)
    torch.testing.assert_close(penalty, torch.stack(slow).mean(), atol=1e-5, rtol=1e-4)
