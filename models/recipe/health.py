"""How a pretraining is watched for collapse while it runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from models.recipe.parts import Part


class Health(Part):
    """What is measured on fixed crops of the training scans, and from where on it is a collapse.

    Measuring changes no weight and draws no number of the training's.
    """

    every: NonNegativeInt = 500
    """Steps between two measurements; 0 measures nothing."""
    num_crops: Annotated[int, Field(ge=8, le=256)] = 32
    previews: bool = True
    """Draw what the decoder makes of some crops, if there is one."""
    min_std: NonNegativeFloat = 0.01
    """Least standard deviation of unit-length features, where 1 is as of random directions."""
    min_rank: NonNegativeFloat = 1.05
    """Least effective rank; 1 is a single direction."""
    stop_on_collapse: bool = False
    """End the run at a collapse, rather than say it."""
