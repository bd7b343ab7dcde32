"""How a segmentation was looked at, and how sure the model was: parts of its result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.schemas.base import Answer, Sha256, Size

Axis = Literal["i", "j", "k"]
"""Of RAS+: right, anterior, superior."""


class StageWindows(Answer):
    """Windows that went through the networks."""

    coarse: int
    fine: int


class CascadePasses(Answer):
    """What the two passes of a cascade did."""

    organ: str
    coarse_voxels: Size = Field(description="Of the grid of the coarse pass.")
    organ_ml: float = Field(description="Of what the coarse pass took for the organ.")
    box_voxels: Size = Field(description="Of the part that the fine pass looked at, at its grid.")
    num_windows: StageWindows
    fallback: Literal["organ_not_found"] | None = Field(
        description="Why the fine pass looked at the whole scan; null where it did not."
    )
    is_cut: bool = Field(
        description="A label reaches a face of the box behind which the scan goes on."
    )


class EntropyMap(Answer):
    """The map's file; `GET .../uncertainty` downloads it."""

    sha256: Sha256
    size_bytes: int
    max_corner_error_mm: float = Field(description="Below 0.001, or there is no result.")


class Uncertainty(Answer):
    """Normalised entropy of the model's probabilities: 0 sure, 1 knows nothing."""

    mean_foreground_entropy: float | None = Field(
        description="Mean where any label wins; null where none does."
    )
    label_entropies: dict[str, float] = Field(
        description="Mean where the label wins; one without voxels is left out."
    )
    map: EntropyMap | None = Field(None, description="Null unless `uncertainty` was asked for.")


class OutOfDistribution(Answer):
    """How far the scan lies from those that the model was trained on."""

    score: float | None = Field(
        description="Distance of the scan's embedding from the training scans', by `method`."
    )
    threshold: float | None = Field(description="From the training scans' own distances.")
    is_out: bool | None = Field(description="The score is above the threshold.")
    n_reference: int = Field(description="Training scans behind it.")
    reason: Literal["no_reference", "too_few_scans", "cascade", "nothing_seen"] | None = Field(
        None, description="Why there is no score; null where there is one."
    )
    method: Literal["cosine", "mahalanobis"] | None = Field(
        None,
        description="`mahalanobis`, with a shrunk covariance; of models of before `cosine`, one "
        "minus the mean cosine to the nearest. Null without a score, and in results of before.",
    )


class QualityFlag(Answer):
    """Whether somebody should look at the result."""

    flag: Literal["ok", "review", "unknown"] = Field(
        description="`unknown`: the model has no threshold."
    )
    reasons: tuple[
        Literal["uncertain", "nothing_found", "box_reaches_edge", "stages_disagree"], ...
    ] = Field((), description="Of `review`.")
    max_foreground_entropy: float | None = Field(
        None, description="The model's threshold, from the scans that judged its training."
    )
