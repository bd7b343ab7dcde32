"""nnU-Net's raw layout (`nnUNet_raw`), versions 1 and 2.

    dataset.json                          channel_names (1: modality), labels, file_ending
    imagesTr/CASE_0000.nii.gz, ...        one file a channel
    labelsTr/CASE.nii.gz
    imagesTs/CASE_0000.nii.gz, labelsTs/  tests

Of version 2, labels may be regions (lists of values) and `ignore` marks voxels nobody labelled;
`dataset` may name the files of each case. 2D data sets (PNG, TIFF) are refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from imaging.datasets.files import Files
from imaging.datasets.plan import Case, LayoutError, Options, Plan, Split, by_slug, slug
from imaging.datasets.tables import document

_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")


class Named(BaseModel):
    """The files of a case, where `dataset` names them."""

    model_config = ConfigDict(frozen=True)

    images: tuple[str, ...]
    label: str


class Description(BaseModel):
    """What is used of a `dataset.json`; what else it says does not count."""

    model_config = ConfigDict(frozen=True)

    channel_names: dict[int, str] = {}
    modality: dict[int, str] = {}
    labels: dict[str, str | int | tuple[int, ...]] = Field(min_length=1)
    file_ending: str = ".nii.gz"
    dataset: dict[str, Named] = {}

    @property
    def channels(self) -> tuple[str, ...]:
        """Names in order."""
        named = self.channel_names or self.modality
        return tuple(slug(name) for _, name in sorted(named.items()))


def read(folder: Path, options: Options) -> Plan:
    """The plan of a data set's folder (`DatasetNNN_Name` or `TaskNNN_Name`)."""
    files = Files(folder)
    found = files.get("dataset.json")
    if found is None:
        raise LayoutError("not_this_layout", "no dataset.json in the folder")
    described = document(files.take(found), Description)
    channels = described.channels
    if not channels or len(set(channels)) < len(channels):
        raise LayoutError("bad_table", f"dataset.json: channels are {channels}; expected names")
    if described.file_ending not in _ENDINGS:
        raise LayoutError(
            "not_this_layout",
            f"file_ending is {described.file_ending[:20]!r}; read are {', '.join(_ENDINGS)}",
        )
    files.explain(r"splits_final\.(?:json|pkl)", "splits of a cross-validation are not imported")
    labels, regions = _labels(described)
    ignored = labels.pop("ignore", None)
    notes = () if ignored is None else (f"value {ignored} marks voxels that nobody labelled",)
    cases = _named(files, described) if described.dataset else _listed(files, described, "Tr")
    cases += _listed(files, described, "Ts")
    return Plan(
        kind="nnunet",
        dims=3,
        channels=channels if len(channels) > 1 else ("image",),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        consumed=files.consumed,
        explained=files.explained,
        labels=labels,
        regions=regions,
        notes=notes,
    )


def _labels(described: Description) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Classes and regions; version 1 maps values to names, version 2 names to values."""
    named: list[tuple[str, int | tuple[int, ...]]] = []
    for left, right in described.labels.items():
        if isinstance(right, tuple):
            named.append((left, right))
            continue
        name, value = (right, left) if isinstance(right, str) else (left, right)
        try:
            number = int(value)
        except ValueError:
            raise LayoutError("bad_table", f"dataset.json: label {left!r} has no value") from None
        if number != 0:
            named.append((str(name), number))
    found = by_slug(named)
    labels = {name: value for name, value in found.items() if isinstance(value, int)}
    regions = {name: value for name, value in found.items() if isinstance(value, tuple)}
    if regions:  # single values beside regions are regions of one value
        regions.update({name: (value,) for name, value in labels.items() if name != "ignore"})
        labels = {name: value for name, value in labels.items() if name == "ignore"}
    return labels, regions


def _listed(files: Files, described: Description, which: str) -> list[Case]:
    ending = re.escape(described.file_ending)
    found: dict[str, dict[int, Path]] = {}
    for path, match in files.matching(rf"images{which}/(?P<case>[^/]+)_(?P<at>\d{{4}}){ending}"):
        found.setdefault(match["case"], {})[int(match["at"])] = path
    labels = {m["case"]: p for p, m in files.matching(rf"labels{which}/(?P<case>[^/]+){ending}")}
    if orphans := sorted(labels.keys() - found.keys()):
        raise LayoutError("file_missing", f"labels{which} has {orphans[0]}, images{which} has not")
    split: Split | None = "test" if which == "Ts" else None
    cases = []
    for name, by_channel in found.items():
        if sorted(by_channel) != list(range(len(described.channels))):
            raise LayoutError(
                "file_missing",
                f"case {name} has channels {sorted(by_channel)}; "
                f"dataset.json names {len(described.channels)}",
            )
        images = tuple(files.image(by_channel[at]) for at in sorted(by_channel))
        truth = files.image(labels[name]) if name in labels else None
        cases.append(Case(name, images, name, truth, split))
    return cases


def _named(files: Files, described: Description) -> list[Case]:
    cases = []
    for name, of in described.dataset.items():
        if len(of.images) != len(described.channels):
            raise LayoutError("file_missing", f"case {name} has {len(of.images)} images")
        images = tuple(files.image(files.need(image)) for image in of.images)
        cases.append(Case(name, images, name, files.image(files.need(of.label))))
    return cases
