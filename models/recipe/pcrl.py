"""PCRL's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from models import presets
from models.recipe.ablations import ABLATIONS
from models.recipe.method import MethodRecipe, Sections

Reconstruction = Literal["o", "m", "h", "mixup_o", "mixup_h"]
"""What is decoded: the ordinary, momentum and hybrid encoder, and two of the batch mixed with
itself (the official code's second pass)."""

Contrast = Literal["views", "mixup", "mixed_key"]
"""A pair that is contrasted: query and key; those of the batch mixed with itself; the mixed query
and the mix of the keys."""

Pushed = Literal["query", "key", "hybrid", "mixup_key", "mixed_key"]
"""An embedding that may enter the queue."""


class Pcrl(MethodRecipe):
    """PCRL's own numbers; the defaults are P's (sections 3 and 7).

    Rows, traps and bugs are those of algorithms.md 1.2 and 1.4; docs/methods/pcrl.md lists every
    row with its value in each preset.
    """

    TITLE: ClassVar[str] = "PCRL"

    name: Literal["pcrl"] = "pcrl"
    preset: Literal[
        "paper", "official", "recommended", "contra_loss", "self_recons", "rotnet",
        "trans_att_flip", "trans_att", "crossmix_05", "crossmix_1",
    ] = "paper"  # fmt: skip
    """Where the values of fields come from that were not given (`models.presets`, `ablations`)."""
    embedding_size: PositiveInt = 128
    queue_size: PositiveInt = 16384
    temperature: PositiveFloat = 0.2
    ema_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    mix_alpha: PositiveFloat = 1.0
    """CrossMix draws lambda from Beta(alpha, alpha), one a step."""
    mix_fold: bool = False
    """Take the larger of lambda and 1 - lambda (row 7)."""
    crossmix: Literal["before_attention", "after_attention"] = "before_attention"
    """Mix, then attend to a third T, the hybrid's own; or mix what was attended to T_o and T_m, the
    target being the mix of the two transformed views (rows 5 and 6)."""
    contrast_weight: Annotated[float, Field(ge=0.0)] = 0.5
    reconstruction_weight: Annotated[float, Field(ge=0.0)] = 0.5
    attention: Literal["outer", "se", "none"] = "outer"
    """TransAtt: `outer` is P's Eq. 1-3, `se` the official code's squeeze-and-excitation."""
    outer_rank: PositiveInt | None = None
    """Low-rank form of the C x C x C bilinear map of Eq. 2; None is the full map."""
    post_conv: bool = True
    """The 3x3x3 convolution after the gate (Eq. 4)."""
    projector_input: Literal["post", "pre"] = "post"
    """What the projector pools: features after TransAtt (P) or before it."""
    skip: bool = True
    """Skip connections into the decoder (row 8); without, it sees the bottleneck alone."""
    reconstructions: tuple[Reconstruction, ...] = ("o", "m", "h")
    """What the decoder is trained on; where it is nothing, there is no decoder."""
    reconstruction_reduction: Literal["sum", "mean"] = "sum"
    """Over the reconstructions (row 17)."""
    target: Literal["clean", "corrupted"] = "clean"
    """T of the view before painting and blur, or after (row 10)."""
    contrast_loss: Literal["info_nce", "nce"] = "info_nce"
    """Softmax over the queue, or one binary decision a candidate (row 11)."""
    normaliser_momentum: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """Of the average that is `nce`'s normaliser Z; 1 freezes it after the first batch, as the
    official code does (bug B1)."""
    contrasts: Annotated[tuple[Contrast, ...], Field(min_length=1)] = ("views",)
    """The terms of the contrastive loss, which is their mean (row 12)."""
    push: Annotated[tuple[Pushed, ...], Field(min_length=1)] = ("query", "key", "hybrid")
    """What enters the queue after a step, in this order (row 13)."""
    push_when: Literal["after_step", "each_term"] = "after_step"
    """With `each_term` a term's key is among the negatives of the step's later terms (bug B3)."""
    mask_same_scan: bool = False
    """Whether embeddings of a query's own scan are no negatives of it (trap B4)."""
    momentum_groups: PositiveInt = 4
    """Shuffled groups in which the momentum encoder normalises a batch (row 22; P had 4 GPUs).
    Fewer where a group would hold a single sample."""
    transformation: Literal["flips_and_turns", "flips", "none"] = "flips_and_turns"
    """What T consists of: what the decoder is asked for, and the indicator vector says."""
    rotation_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Of telling by how many quarter turns the ordinary view was turned (RotNet); 0: not asked."""

    ADDED: ClassVar[Mapping[str, object]] = {
        "transformation": "flips_and_turns",
        "rotation_weight": 0.0,
    }

    @property
    def has_mixup_pass(self) -> bool:
        """Whether the batch mixed with itself is encoded too."""
        return any("mix" in term for term in (*self.contrasts, *self.reconstructions))

    @classmethod
    def defaults(cls, preset: object) -> Sections:
        """Those of the preset; none of an unknown one, which the recipe's own check names."""
        known = {**presets.PRESETS, **ABLATIONS}
        return known.get(preset, {}) if isinstance(preset, str) else {}

    @property
    def trains_decoder(self) -> bool:
        """As long as anything is reconstructed."""
        return bool(self.reconstructions)

    @property
    def has_skips(self) -> bool:
        """As `skip` says."""
        return self.skip

    @property
    def needs_several_scans(self) -> bool:
        """With `mask_same_scan` one scan has no negatives."""
        return self.mask_same_scan

    def num_groups(self, batch_size: int) -> int:
        """The groups in which the momentum encoder normalises."""
        return min(self.momentum_groups, batch_size // 2)

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """The queue holds a step's pushes; the 2D network has skips."""
        pushed = len(self.push) * batch_size
        if self.queue_size < pushed:
            raise ValueError(
                f"queue_size {self.queue_size} is below the {pushed} vectors of one step"
            )
        if dims == 2 and not self.skip:
            raise ValueError("skip false is for unet3d alone; this is resnet18_unet2d")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        return {**cls.defaults(given.get("preset")).get("method", {}), **given}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("reconstructions", "contrasts", "push"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names one thing twice: {', '.join(values)}")
        if self.outer_rank is not None and self.attention != "outer":
            raise ValueError(f"outer_rank belongs to attention 'outer', not {self.attention!r}")
        if self.contrast_weight == self.reconstruction_weight == self.rotation_weight == 0:
            raise ValueError("contrast_weight and reconstruction_weight are both 0")
        self._check_decoder()
        self._check_mixup()
        return self

    def _check_decoder(self) -> None:
        if (self.reconstruction_weight > 0) != bool(self.reconstructions):
            raise ValueError("reconstruction_weight is 0 if and only if reconstructions is empty")
        if self.attention == "none" and self.transformation != "none":
            raise ValueError(
                f"without attention nothing tells the decoder of {self.transformation}: "
                "transformation must be 'none'"
            )
        if self.attention == "none" and (self.post_conv or self.projector_input == "post"):
            raise ValueError("post_conv and projector_input 'post' belong to an attention")

    def _check_mixup(self) -> None:
        contrasts = [term for term in self.contrasts if term != "views"]
        pushed = [name for name in self.push if name in ("mixup_key", "mixed_key")]
        if contrasts and self.projector_input == "post":
            raise ValueError(
                f"contrasts {contrasts} need projector_input 'pre': the pass over the mixed batch "
                "has no TransAtt to read after"
            )
        if pushed and not self.has_mixup_pass:
            raise ValueError(
                f"push names {pushed}, which only the pass over the mixed batch makes: name "
                "'mixup' or 'mixed_key' in contrasts, or leave them out"
            )
        if self.mask_same_scan and (contrasts or pushed):
            raise ValueError(
                "mask_same_scan needs embeddings of one scan each, and those of the mixed batch "
                f"are of two: leave {sorted({*contrasts, *pushed})} out of contrasts and push"
            )
