"""PCRL's presets: what each sets differently from the recipe's own defaults, which are `paper`.

- `paper`: the method as printed (Zhou et al., ICCV 2021, sections 3 and 7).
- `official`: the authors' public code, which is another algorithm (algorithms.md 1.2): no outer
  product, mixing after the attention, a second pass over a batch mixed with itself, binary NCE in
  three terms, corrupted targets. Left out are its plain errors, listed in docs/methods/pcrl.md.
- `recommended`: the paper's step with what its tables argue for. The gate is `se` and stands alone:
  `outer` needs 134 M weights at 512 channels, seven times the U-Net, and the convolution behind it
  7 M more that are thrown away after pretraining. The projector reads the features before the gate,
  so that the embedding that is served does not depend on a transformation drawn at random. The
  queue takes keys alone and so spans more than one epoch rather than half of one, and crops of a
  query's own scan are not its negatives.

A section names a part of `PretrainRecipe`; `recipe` stands for the recipe's own fields. Those with
`_2d` are of `PretrainRecipe2d`.
"""

from __future__ import annotations

from collections.abc import Mapping

Defaults = Mapping[str, object]

PRESETS: Mapping[str, Mapping[str, Defaults]] = {
    "paper": {"method": {}, "crops": {}, "recipe": {}, "crops_2d": {}, "recipe_2d": {}},
    "official": {
        "method": {
            "attention": "se",
            "post_conv": False,
            "projector_input": "pre",
            "crossmix": "after_attention",
            "mix_fold": True,
            "reconstructions": ("o", "h", "mixup_o", "mixup_h"),
            "reconstruction_reduction": "mean",
            "target": "corrupted",
            "contrast_loss": "nce",
            "contrasts": ("views", "mixup", "mixed_key"),
            "push": ("key", "mixup_key", "mixed_key"),
            "push_when": "each_term",
            "ema_momentum": 0.999,
            "contrast_weight": 1.0,
            "reconstruction_weight": 1.0,
        },
        "crops": {
            "crop_sizes": ((64, 64, 32), (96, 96, 48), (96, 96, 96), (32, 32, 16), (112, 112, 64)),
            "equal_sizes": False,
            "min_iou": 0.25,
            "border": (70, 70, 15),
            "max_tissue": 0.15,
            "flip_axes": ("i",),
            "rotation": "all",
            "max_scaling": 0.1,
            "shuffle_probability": 0.5,
        },
        # 241 epochs of 9,968 pairs in batches of 16.
        "recipe": {"batch_size": 16, "num_steps": 150_143},
        "crops_2d": {"outpaint_probability": 0.0},
        # 241 epochs of 78,468 images in batches of 64.
        "recipe_2d": {"batch_size": 64, "num_steps": 295_481},
    },
    "recommended": {
        "method": {
            "attention": "se",
            "post_conv": False,
            "projector_input": "pre",
            "push": ("key",),
            "mask_same_scan": True,
        },
        "crops": {},
        "recipe": {},
        "crops_2d": {},
        "recipe_2d": {},
    },
}
