"""LUNA16: 888 chest CTs as MetaImage, and candidates that are a nodule or not.

    subset0..subset9/SERIES.mhd, SERIES.raw (or .zraw)
    candidates_V2.csv    seriesuid,coordX,coordY,coordZ,class    world mm in LPS

Subsets 0-6 train, 7 and 8 validate, 9 tests (docs/algorithms.md 3.1): the data set numbers its
folds for a tenfold cross-validation and gives no split of its own. A scan counts as a patient; the
data set holds one scan of each, but for a few of LIDC-IDRI's patients that its tables do not tell.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from imaging.datasets.files import Files
from imaging.datasets.plan import Case, Finding, LayoutError, Options, Plan, Split
from imaging.datasets.tables import number, rows

NODULE = "nodule"
_SPLIT_OF: dict[int, Split] = {
    **dict.fromkeys(range(7), "train"), 7: "val", 8: "val", 9: "test",
}  # fmt: skip
_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "class")


def read(folder: Path, options: Options) -> Plan:
    """The plan of a LUNA16 folder; scans without candidates are imported all the same."""
    files = Files(folder)
    files.explain(r"annotations(?:_excluded)?\.csv", "candidates_V2.csv holds the nodules")
    files.explain(r"candidates\.csv", "superseded by candidates_V2.csv")
    files.explain(r"seg-lungs-LUNA16/.*", "masks of lungs are not imported")
    files.explain(r"sampleSubmission\.csv", "an example of a submission")
    findings = _findings(files)
    cases = [
        Case(
            id=match["series"],
            images=(files.image(path),),
            patient=match["series"],
            split=_SPLIT_OF[int(match["fold"])],
            findings=tuple(findings.pop(match["series"], ())),
        )
        for path, match in files.matching(r"subset(?P<fold>[0-9])/(?P<series>[^/]+)\.mhd")
    ]
    notes = []
    if findings:
        notes.append(f"candidates of {len(findings)} scans that are not here are not used")
    return Plan(
        kind="luna16",
        dims=3,
        channels=("image",),
        cases=tuple(cases),
        consumed=files.consumed,
        explained=files.explained,
        classes=(NODULE,) if any(case.findings for case in cases) else (),
        notes=tuple(notes),
    )


def _findings(files: Files) -> dict[str, list[Finding]]:
    """Candidates by series, LPS turned to RAS+."""
    found: dict[str, list[Finding]] = defaultdict(list)
    for table, _ in files.matching(r"candidates_V2\.csv")[:1]:
        for line, cells in rows(files.take(table), _COLUMNS):
            x, y, z = (number(cells[f"coord{axis}"], table, line) for axis in "XYZ")
            if cells["class"] not in ("0", "1"):
                raise LayoutError("bad_table", f"{table.name}, line {line}: class is not 0 or 1")
            found[cells["seriesuid"]].append(Finding({NODULE: int(cells["class"])}, (-x, -y, z)))
    return found
