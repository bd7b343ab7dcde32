"""Public data sets as their makers hand them out: from a folder to a plan of what to import.

plan      what a reader says: cases, and of every file whether it is used or why not
files     the files of a folder, each consumed or explained
tables    CSV and JSON as they come with data sets, without trust
luna16    LUNA16: `.mhd` in ten subsets, candidates of nodules
lits      LiTS: liver and tumour in CT
msd       Medical Segmentation Decathlon: `dataset.json`, channels in 4D
nnunet    nnU-Net's raw layout, versions 1 and 2
brats     BraTS: four MR modalities a case
chest14   NIH ChestX-ray14: PNG, findings in a table
chexpert  CheXpert: JPEG, findings with uncertain ones
channels  one channel of a 4D NIfTI as a volume of its own
shipping  an image of a plan as one file that a service takes
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from imaging.datasets import brats, chest14, chexpert, lits, luna16, msd, nnunet
from imaging.datasets.plan import DEFAULT, Case, Image, LayoutError, Options, Plan

__all__ = ["READERS", "Case", "Image", "LayoutError", "Options", "Plan", "read_layout"]

READERS: dict[str, Callable[[Path, Options], Plan]] = {
    "luna16": luna16.read,
    "lits": lits.read,
    "msd": msd.read,
    "nnunet": nnunet.read,
    "brats": brats.read,
    "chest14": chest14.read,
    "chexpert": chexpert.read,
}


def read_layout(kind: str, folder: Path, options: Options = DEFAULT) -> Plan:
    """The plan of a data set: what of `folder` is imported, and why the rest is not.

    Only names, tables and headers are read here; voxels and pixels are judged when they are used.

    Args:
        kind: One of `READERS`.
        folder: The folder that the archives were unpacked to.
        options: What a reader cannot know.

    Raises:
        LayoutError: `not_this_layout`, `bad_table`, `file_missing`, `split_leaks_patient`,
            `no_such_channel`.
    """
    plan = READERS[kind](folder, options)
    return plan if options.channel is None else plan.of_channel(options.channel)
