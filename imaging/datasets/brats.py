"""BraTS: four MR modalities a case, and labels of the glioma's parts.

    HGG/CASE/CASE_flair.nii.gz, _t1, _t1ce, _t2, _seg     2012-2018, with LGG/ beside HGG/
    CASE/CASE_flair.nii.gz, ...                            from 2019 on
    CASE/CASE-t2f.nii.gz, -t1n, -t1c, -t2w, -seg           from 2023 on

Label values are 1 (necrosis and non-enhancing core), 2 (oedema) and 4 (enhancing; 3 from 2023 on).
The challenge's targets are the regions whole tumour, core and enhancing, which overlap.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from imaging.datasets.files import Files
from imaging.datasets.plan import Case, LayoutError, Options, Plan

CHANNELS = ("flair", "t1", "t1c", "t2")
_CALLED = {
    "flair": "flair", "t2f": "flair", "t1": "t1", "t1n": "t1", "t1ce": "t1c", "t1gd": "t1c",
    "t1c": "t1c", "t2": "t2", "t2w": "t2", "seg": "seg",
}  # fmt: skip
_FILE = r"(?P<case>[^/]+)/(?P<stem>[^/]+)[_-](?P<what>" + "|".join(_CALLED) + r")\.nii(?:\.gz)?"
_TIMEPOINT = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d{3}")


def read(folder: Path, options: Options) -> Plan:
    """The plan of a BraTS folder; cases without `seg` come without labels.

    Raises:
        LayoutError: As `read_layout`; `file_missing` for a case that lacks a modality.
    """
    files = Files(folder)
    files.explain(r"survival_(?:data|info|evaluation)\.csv", "survival is not imported")
    files.explain(r"name_mapping(?:_validation_data)?\.csv", "names of other years' cases")
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    is_of_2023 = False
    for path, match in files.matching(_FILE):
        what = _CALLED[match["what"]]
        is_of_2023 |= match["what"] == "t2f"
        if what in found[match["case"]]:
            raise LayoutError("bad_table", f"case {match['case']} has two files for {what}")
        found[match["case"]][what] = path
    enhancing = 3 if is_of_2023 else 4
    return Plan(
        kind="brats",
        dims=3,
        channels=CHANNELS,
        cases=tuple(_case(files, name, parts) for name, parts in sorted(found.items())),
        consumed=files.consumed,
        explained=files.explained,
        labels={"core_rest": 1, "oedema": 2, "enhancing": enhancing},
        regions={
            "whole_tumour": (1, 2, enhancing),
            "core": (1, enhancing),
            "enhancing": (enhancing,),
        },
    )


def _case(files: Files, name: str, parts: dict[str, Path]) -> Case:
    missing = [channel for channel in CHANNELS if channel not in parts]
    if missing:
        raise LayoutError("file_missing", f"case {name} has no {missing[0]}")
    later = _TIMEPOINT.fullmatch(name)
    return Case(
        id=name,
        images=tuple(files.image(parts[channel]) for channel in CHANNELS),
        patient=later[1] if later else name,
        labels=files.image(parts["seg"]) if "seg" in parts else None,
    )
