"""ChestX-ray14 of the NIH: 112,120 radiographs of 30,805 patients, 14 findings mined from reports.

    Data_Entry_2017.csv (or _v2020)       Image Index, Finding Labels (split by |), Patient ID
    images_001..images_012/images/*.png   or all in images/
    train_val_list.txt, test_list.txt     the official split, by patient

Images of `train_val_list` are left open, for whoever imports to take a validation split from.
"""

from __future__ import annotations

from pathlib import Path

from imaging.datasets.files import Files
from imaging.datasets.plan import Case, Finding, LayoutError, Options, Plan, slug
from imaging.datasets.tables import lines, rows

_NAMES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
)  # fmt: skip
CLASSES = tuple(slug(name) for name in _NAMES)
_NOTHING = "No Finding"
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")


def read(folder: Path, options: Options) -> Plan:
    """The plan of a Chest14 folder; lines of the table whose image is not there are counted."""
    files = Files(folder)
    files.explain(r"BBox_List_2017\.csv", "boxes are not imported")
    files.explain(r".*\.(?:pdf|txt|py)", "documentation")
    images = {path.name: path for path, _ in files.matching(r"[^/]+\.png")}
    tables = files.matching(r"Data_Entry_2017[^/]*\.csv")
    if len(tables) != 1:
        raise LayoutError(
            "not_this_layout", f"{len(tables)} files Data_Entry_2017*.csv; expected 1"
        )
    table = files.take(tables[0][0])
    open_names, test_names = (_listed(files, name) for name in ("train_val", "test"))
    if both := sorted(open_names & test_names):
        raise LayoutError("bad_table", f"{both[0]} stands in both lists")
    cases, num_absent = [], 0
    for line, cells in rows(table, _COLUMNS):
        name = cells["Image Index"]
        if name not in images:
            num_absent += 1
            continue
        cases.append(
            Case(
                id=Path(name).stem,
                images=(files.image(images[name]),),
                patient=cells["Patient ID"].strip(),
                split="test" if name in test_names else None,
                findings=(Finding(_classes(cells["Finding Labels"], table, line)),),
            )
        )
    files.explain(r"[^/]+\.png", f"{table.name} does not name it")
    notes = [f"{num_absent} images of {table.name} are not here"] if num_absent else []
    return Plan(
        kind="chest14",
        dims=2,
        channels=("image",),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        consumed=files.consumed,
        explained=files.explained,
        classes=CLASSES,
        notes=tuple(notes),
    )


def _listed(files: Files, name: str) -> set[str]:
    found = files.get(f"{name}_list.txt")
    return set(lines(files.take(found))) if found else set()


def _classes(text: str, table: Path, line: int) -> dict[str, int]:
    named = {part.strip() for part in text.split("|")}
    unknown = named - {*_NAMES, _NOTHING}
    if unknown or (_NOTHING in named and len(named) > 1):
        raise LayoutError("bad_table", f"{table.name}, line {line}: findings {text[:80]!r}")
    return {slug(name): int(name in named) for name in _NAMES}
