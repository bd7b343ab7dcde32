"""LiTS: 131 abdominal CTs with liver (1) and tumour (2), and 70 for testing without labels.

    .../volume-N.nii(.gz), .../segmentation-N.nii(.gz), .../test-volume-N.nii(.gz)

The folders in between differ from mirror to mirror and do not count. The test scans are given to
`test`: pretraining leaves them alone.
"""

from __future__ import annotations

from pathlib import Path

from imaging.datasets.files import Files
from imaging.datasets.plan import Case, LayoutError, Options, Plan


def read(folder: Path, options: Options) -> Plan:
    """The plan of a LiTS folder."""
    files = Files(folder)
    labels = {m["n"]: path for path, m in files.matching(r"segmentation-(?P<n>\d+)\.nii(?:\.gz)?")}
    cases = []
    for path, match in files.matching(r"(?P<test>test-)?volume-(?P<n>\d+)\.nii(?:\.gz)?"):
        is_test = match["test"] is not None
        truth = None if is_test else labels.pop(match["n"], None)
        cases.append(
            Case(
                id=f"{'test-' if is_test else ''}volume-{match['n']}",
                images=(files.image(path),),
                patient=f"{'test-' if is_test else ''}{match['n']}",
                labels=None if truth is None else files.image(truth),
                split="test" if is_test else None,
            )
        )
    if labels:
        raise LayoutError(
            "file_missing", f"segmentation-{min(labels, key=int)} has no volume of its number"
        )
    return Plan(
        kind="lits",
        dims=3,
        channels=("image",),
        cases=tuple(cases),
        consumed=files.consumed,
        explained=files.explained,
        labels={"liver": 1, "tumour": 2},
    )
