"""RotNet: by how many quarter turns was the crop turned?

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018,
Eq. 2 and 3: every crop is shown in all four orientations, and the loss is the mean cross-entropy
over them. Turns are in the plane of the first two axes, as P's (docs/methods/rotnet.md).

B samples, C channels of the bottleneck; crops are (B, 1, I, J, K), in 2D (B, 3, I, J).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models import recipe as recipes
from models.networks.unet3d import pooled
from models.recipe import AnyPretrain
from trainer.build import build_student
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.methods.pairs import make_crops, make_pairs

NUM_TURNS = 4


class RotNet(Method[Tensor, Losses]):
    """An encoder and one linear layer on what it pools."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, recipes.RotNet)
        self.spec = recipe.method
        self.student = build_student(recipe, fused=False)
        self.head = nn.Linear(recipe.network.num_features, NUM_TURNS)

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Tensor:
        """One crop of each sample, upright."""
        if self.spec.corrupted:
            return make_pairs(self.recipe, volumes, sampler, step).spoiled[0]
        return make_crops(self.recipe, volumes, sampler, step)[0]

    def losses(self, views: Tensor) -> Losses:
        """Cross-entropy over the four orientations of every crop."""
        loss, accuracy = turn_loss(
            self.head(pooled(self.student.encoder(in_all_turns(views)).bottleneck))
        )
        return Losses(loss, {"rotation_accuracy": accuracy})


def in_all_turns(images: Tensor) -> Tensor:
    """Every image turned by 0, 90, 180 and 270 degrees, as `np.rot90` turns.

    Args:
        images: (B, C, I, J, ...), I == J.

    Returns:
        (4 B, C, I, J, ...), turn by turn.
    """
    return torch.cat([images.rot90(turns, dims=(2, 3)) for turns in range(NUM_TURNS)])


def turn_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the turns, and the share that is told right.

    Args:
        logits: (4 B, 4), in the order of `in_all_turns`.
    """
    target = torch.arange(NUM_TURNS, device=logits.device).repeat_interleave(
        len(logits) // NUM_TURNS
    )
    right = (logits.argmax(dim=1) == target).float().mean()
    return F.cross_entropy(logits.float(), target), right
