"""CheXpert: chest radiographs of Stanford, 14 observations of which some are uncertain.

    train.csv, valid.csv (and test.csv)    Path, Sex, Age, Frontal/Lateral, AP/PA, observations
    train/patient00001/study1/view1_frontal.jpg, ...

A cell is 1.0, 0.0, -1.0 (uncertain) or empty (not mentioned); `Options` says what the last two
become. `Path` begins with the name of the archive (`CheXpert-v1.0-small/`), which may be the folder
itself. `train.csv` trains, `valid.csv` validates, `test.csv` tests.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from imaging.datasets.files import Files
from imaging.datasets.plan import Case, Finding, LayoutError, Options, Plan, Split, slug
from imaging.datasets.tables import rows

_NAMES = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
CLASSES = tuple(slug(name) for name in _NAMES)
_TABLES: dict[str, Split] = {"train.csv": "train", "valid.csv": "val", "test.csv": "test"}
_PATH = re.compile(
    r"(?:.*/)?(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<view>view\d+_\w+)\.jpg"
)
_VIEW = "Frontal/Lateral"


def read(folder: Path, options: Options) -> Plan:
    """The plan of a CheXpert folder."""
    files = Files(folder)
    cases: list[Case] = []
    num_absent = 0
    for name, split in _TABLES.items():
        for table, _ in files.matching(re.escape(name))[:1]:
            found, absent = _cases(files, files.take(table), split, options)
            cases += found
            num_absent += absent
    files.explain(r"[^/]+_(?:frontal|lateral)\.jpg", f"the views asked for are {options.views}")
    policy = f"uncertain: {options.uncertain}; not mentioned: {options.unmentioned}"
    absent_note = [f"{num_absent} images of the tables are not here"] if num_absent else []
    return Plan(
        kind="chexpert",
        dims=2,
        channels=("image",),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        consumed=files.consumed,
        explained=files.explained,
        classes=CLASSES,
        notes=(policy, *absent_note),
    )


def _cases(files: Files, table: Path, split: Split, options: Options) -> tuple[list[Case], int]:
    cases, num_absent = [], 0
    for line, cells in rows(table, ("Path", _VIEW)):
        named = _PATH.fullmatch(cells["Path"])
        if named is None:
            raise LayoutError("bad_table", f"{table.name}, line {line}: no path of an image")
        if options.views not in ("all", cells[_VIEW].lower()):
            continue
        path = _find(files, cells["Path"])
        if path is None:
            num_absent += 1
            continue
        cases.append(
            Case(
                id="_".join(named.group("patient", "study", "view")),
                images=(files.image(path),),
                patient=named["patient"],
                split=split,
                findings=(Finding(_classes(cells, table, line, options)),),
            )
        )
    return cases, num_absent


def _find(files: Files, name: str) -> Path | None:
    """The image, whether the folder is that of the archive or the one above it."""
    return files.get(name) or files.get(str(PurePosixPath(*PurePosixPath(name).parts[1:])))


def _classes(cells: dict[str, str], table: Path, line: int, options: Options) -> dict[str, int]:
    """Known classes; columns that the table does not have (test.csv) are not known."""
    rules: dict[str, int | None] = {
        "1.0": 1, "1": 1, "0.0": 0, "0": 0,
        "-1.0": {"ignore": None, "zeros": 0, "ones": 1}[options.uncertain],
        "": {"ignore": None, "zeros": 0}[options.unmentioned],
    }  # fmt: skip
    rules["-1"] = rules["-1.0"]
    known = {}
    for name in _NAMES:
        if (text := cells.get(name)) is None:
            continue
        if text not in rules:
            raise LayoutError("bad_table", f"{table.name}, line {line}: {name} is {text[:20]!r}")
        if (value := rules[text]) is not None:
            known[slug(name)] = value
    return known
