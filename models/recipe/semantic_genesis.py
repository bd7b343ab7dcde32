"""Semantic Genesis' own numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from models.recipe.method import MethodRecipe, Sections, require_volumes
from models.recipe.models_genesis import GENESIS_CROPS
from models.recipe.parts import Share, Size

VERSION_SIDES = range(50, 80, 2)


class SemanticGenesis(MethodRecipe):
    """Restore a crop and tell which anatomical pattern it shows (Haghighi et al., MICCAI 2020).

    A pattern is what lies at one place of scans that look alike; the classes are found before the
    training. Of `crops.crop_sizes` the first is how a pattern is cut, the others are how its
    versions are cut. See docs/methods/semantic_genesis.md.
    """

    TITLE: ClassVar[str] = "Semantic Genesis"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {
            **GENESIS_CROPS,
            "crop_sizes": ((64, 64, 32), *((side, side, 32) for side in VERSION_SIDES)),
            "flip_probability": 0.0,
        },
        # As many crops as P's PCRL sees: 240 epochs of 9,920.
        "recipe": {
            "batch_size": 12,
            "num_steps": 198_400,
            "learning_rate": 1e-3,
            "momentum": 0.9,
            "weight_decay": 0.0,
        },
        # Every 40 epochs of 2,200 steps (44 classes of 200 scans in 3 versions).
        "optimizer": {
            "kind": "adam",
            "schedule": {"kind": "drops", "at": (0.443, 0.887), "factor": 0.5},
        },
    }

    name: Literal["semantic_genesis"] = "semantic_genesis"
    num_classes: Annotated[int, Field(ge=2)] = 44
    neighbours: PositiveInt = 200
    """Scans that show a class: those that are nearest to its reference scan, itself included (P:
    200 in 3D). All scans, where there are fewer."""
    least_distance: NonNegativeFloat = 5.0
    """Voxels between the places of two classes."""
    version_share: Share = 2 / 3
    """Of crops that are cut in another size and beside their place: two versions of three."""
    jitter: NonNegativeInt = 10
    """Voxels along I and J by which a version lies beside its place, at most."""
    elastic_alpha: NonNegativeFloat = 991.0
    elastic_sigma: PositiveFloat = 8.0
    """Voxels; see `trainer.data.elastic`. Every crop is deformed."""
    changes: Annotated[
        tuple[Literal["shuffle", "curve", "inpaint", "outpaint"], ...], Field(min_length=1)
    ] = ("shuffle", "curve", "inpaint", "outpaint")
    """One of these follows, all alike."""
    restoration_weight: PositiveFloat = 1.0
    class_weight: Annotated[float, Field(ge=0.0)] = 0.01
    head_width: PositiveInt = 1024
    """Channels of the convolution before the classes."""
    autoencoder_size: Size = (128, 128, 64)
    """Voxels that a whole scan is resized to, to see which scans look alike."""
    autoencoder_steps: PositiveInt = 10_000
    autoencoder_batch_size: PositiveInt = 4
    autoencoder_learning_rate: PositiveFloat = 1e-3
    """Of Adam."""

    @property
    def trains_decoder(self) -> bool:
        """It restores."""
        return True

    def num_groups(self, batch_size: int) -> int:
        """One: several processes would each find classes of their own."""
        return 1

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """In 3D alone."""
        require_volumes(self.TITLE, dims)

    def check_crops(self, size: tuple[int, ...]) -> None:
        """The autoencoder halves three times."""
        if any(extent % 8 for extent in self.autoencoder_size):
            raise ValueError(f"autoencoder_size {self.autoencoder_size} must be multiples of 8")
