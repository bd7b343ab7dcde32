"""Cascades: what is asked to make a model of two passes out of registered ones."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from service.schemas.base import Ask, ModelReference

Label = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$", examples=["liver"])]


class CascadeCreate(Ask):
    """Two passes: an organ at low resolution, then its box at full."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "fine": "liver-tumour/3",
                    "coarse": "models:/liver@coarse",
                    "organ": "liver",
                    "margin_mm": 15.0,
                },
                {"fine": "liver-tumour/3", "organ": "liver", "coarse_spacing_mm": 4.0},
            ]
        },
    )

    fine: ModelReference = Field(description="The segmenter that makes the mask.")
    coarse: ModelReference | None = Field(
        None,
        description="The segmenter that finds the organ, at its own spacing; null: `fine` does, "
        "at `coarse_spacing_mm`.",
    )
    organ: Label = Field(description="A label of the model that finds it.")
    parts: Annotated[tuple[Label, ...], Field(max_length=32)] | None = Field(
        None,
        description="Labels that lie in the organ and count as it; those of that model's "
        "`postprocess` if null.",
    )
    margin_mm: Annotated[float, Field(ge=0.0, le=500.0)] | None = Field(
        None,
        description="Around the organ's box, on each side. Null: what `fine` saw in training "
        "(`crop` of its recipe), else 15.",
    )
    coarse_spacing_mm: Annotated[float, Field(gt=0.0, le=50.0)] | None = Field(
        None, description="4 if null; not together with `coarse`."
    )
    min_organ_ml: Annotated[float, Field(ge=0.0, le=1e6)] = Field(
        1.0,
        description="An organ smaller than this counts as not found: the whole scan is looked at.",
    )

    @model_validator(mode="after")
    def _one_spacing(self) -> Self:
        if self.coarse is not None and self.coarse_spacing_mm is not None:
            raise ValueError("coarse has a spacing of its own; leave coarse_spacing_mm out")
        return self
