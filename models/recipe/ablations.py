"""PCRL taken apart: the rows of the paper's tables 1 and 2 as presets of the same recipe.

Each is the contrast of two views and what the row adds to it, with `paper`'s values for the rest.
Without TransAtt there is nothing to tell the decoder of a transformation, so the target has none,
and the projector reads the bottleneck itself. The hybrid's embedding is pushed where there is a
hybrid. Table 2 replaces self-reconstruction by RotNet, so that row has no decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from models.recipe.method import Defaults, Sections

_PLAIN: Defaults = {
    "attention": "none",
    "post_conv": False,
    "transformation": "none",
    "projector_input": "pre",
    "push": ("query", "key"),
}
_NO_DECODER: Defaults = {**_PLAIN, "reconstructions": (), "reconstruction_weight": 0.0}
_ATTENDED: Defaults = {"push": ("query", "key"), "reconstructions": ("o", "m")}
_MIXED: Defaults = {**_PLAIN, "push": ("query", "key", "hybrid")}

ABLATIONS: Mapping[str, Sections] = {
    "contra_loss": {"method": {**_NO_DECODER, "contrast_weight": 1.0}},
    "self_recons": {"method": {**_PLAIN, "reconstructions": ("o",)}},
    "rotnet": {"method": {**_NO_DECODER, "rotation_weight": 0.5}},
    "trans_att_flip": {"method": {**_ATTENDED, "transformation": "flips"}},
    "trans_att": {"method": _ATTENDED},
    "crossmix_05": {"method": {**_MIXED, "mix_alpha": 0.5}},
    "crossmix_1": {"method": _MIXED},
}
