"""What training minimises, in float32 whatever precision the network runs in.

B batch, C classes with background first, E embedding, N queue, I J K voxels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor


def nce_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    ignored: Tensor | None = None,
) -> Tensor:
    """Noise-contrastive estimation between two views (paper Eq. 7).

    Departs from Eq. 7 as printed, whose denominator sums the queue alone: here the positive
    pair is in the denominator too, as in MoCo (He et al., 2020, Eq. 1), so the loss is a
    cross-entropy and never negative.

        for each sample b:
            logits = [query[b] . key[b]] + [query[b] . k for k in queue if not ignored]
            loss += cross_entropy(logits / temperature, target=0)

    Args:
        query: Unit-length embeddings from the ordinary encoder, (B, E); carries the gradient.
        key: Unit-length embeddings from the momentum encoder, (B, E); detached.
        queue: Unit-length past embeddings, the negatives, (N, E).
        temperature: Softmax temperature (tau in the paper), > 0.
        ignored: Which of the queue are no negatives of which sample, bool (B, N).

    Returns:
        Scalar loss, mean over the batch.
    """
    logits = _candidates(query, key, queue, temperature, ignored)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(logits, target)


def binary_nce_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    normaliser: Tensor,
    *,
    ignored: Tensor | None = None,
) -> Tensor:
    """Noise-contrastive estimation as one binary decision a candidate (Wu et al., 2018).

    What the official code minimises. With x = exp(s / temperature) / Z for a candidate of
    similarity s, and N negatives,

        for each sample b:
            loss -= log(x_key / (x_key + N))
            for k in queue:
                loss -= log(N / (x_k + N))

    which is binary cross-entropy of the logits s / temperature - log Z - log N. The official code's
    number of samples cancels (B2), and its epsilon is not needed in this form.

    Args:
        query: As in `nce_loss`, with the next three and the last.
        key: (B, E).
        queue: (N, E).
        temperature: > 0.
        normaliser: Z, scalar; see `mean_candidate`.
        ignored: Bool (B, N).

    Returns:
        Scalar loss, mean over the batch, sum over the candidates.
    """
    logits = _candidates(query, key, queue, temperature, ignored)
    logits = logits - normaliser.log() - math.log(len(queue))
    positive, negatives = logits[:, 0], logits[:, 1:]
    return (F.softplus(-positive) + F.softplus(negatives).sum(dim=1)).mean()


@torch.no_grad()
def mean_candidate(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean of exp(s / temperature) over all candidates of the batch: an estimate of Z, scalar."""
    return _candidates(query, key, queue, temperature, None).exp().mean()


def _candidates(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, ignored: Tensor | None
) -> Tensor:
    """Similarities to the key, then to the queue, over the temperature, (B, 1 + N).

    In float32: autocast would compute the product in bfloat16.
    """
    with torch.autocast(query.device.type, enabled=False):
        positive = (query * key).sum(dim=1, keepdim=True)  # (B, 1)
        negatives = query @ queue.T  # (B, N)
        if ignored is not None:
            negatives = negatives.masked_fill(ignored, -math.inf)
        return torch.cat([positive, negatives], dim=1) / temperature


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """One minus the soft Dice of every class but background, over the batch as one volume.

        for each class c >= 1:
            overlap = sum of softmax(logits)[c] where target == c
            size = sum of softmax(logits)[c] + number of voxels where target == c
            loss += 1 - (2 * overlap + smooth) / (size + smooth)

    Args:
        logits: (B, C, I, J, K).
        target: Class of each voxel, int64 (B, I, J, K).
        smooth: Keeps a class that is absent and not predicted at Dice 1.

    Returns:
        Scalar loss, mean over the classes, in [0, 1].
    """
    probability = logits.float().softmax(dim=1)[:, 1:]
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probability.dtype)
    over = (0, 2, 3, 4)
    overlap = (probability * truth).sum(dim=over)  # (C - 1,)
    size = probability.sum(dim=over) + truth.sum(dim=over)
    return (1.0 - (2.0 * overlap + smooth) / (size + smooth)).mean()


def segmentation_loss(
    logits: Tensor, target: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    """Dice loss plus voxel-wise cross-entropy, equally weighted; arguments as in `dice_loss`.

    `class_weights` (C,) weight the voxels of each class in the cross-entropy, whose mean is over
    the weights.
    """
    entropy = F.cross_entropy(logits.float(), target, weight=class_weights)
    return dice_loss(logits, target) + entropy


def region_loss(logits: Tensor, target: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """Soft Dice plus binary cross-entropy of regions that may overlap, equally weighted.

    Both take logits; the official code feeds a cross-entropy "with logits" what went through a
    sigmoid already (bug B16).

        for each region r:
            overlap = sum of sigmoid(logits)[r] inside the region
            size = sum of sigmoid(logits)[r] + number of voxels of the region
            loss += 1 - (2 * overlap + smooth) / (size + smooth)
        loss / number of regions + mean over all voxels of the cross-entropy

    Args:
        logits: (B, R, I, J, K).
        target: 1 inside a region, 0 outside, (B, R, I, J, K).
        smooth: As in `dice_loss`.
    """
    probability, truth = logits.float().sigmoid(), target.float()
    over = (0, 2, 3, 4)
    overlap = (probability * truth).sum(dim=over)  # (R,)
    size = probability.sum(dim=over) + truth.sum(dim=over)
    dice = (1.0 - (2.0 * overlap + smooth) / (size + smooth)).mean()
    return dice + F.binary_cross_entropy_with_logits(logits.float(), truth)


def multi_label_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy over what is known.

    Args:
        logits: (B, L).
        truth: 1, 0, or NaN where it is not known, (B, L).

    Returns:
        Scalar loss, mean over the known entries; 0 where nothing is known.
    """
    is_known = ~truth.isnan()
    each = F.binary_cross_entropy_with_logits(
        logits.float(), truth.nan_to_num(0.0), reduction="none"
    )
    return (each * is_known).sum() / is_known.sum().clamp(min=1)
