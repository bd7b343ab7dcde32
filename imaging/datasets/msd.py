"""Medical Segmentation Decathlon: one task, described by its `dataset.json`.

    dataset.json                  modality, labels, training, test
    imagesTr/NAME.nii.gz          3D, or 4D with one channel for each of `modality`
    labelsTr/NAME.nii.gz, imagesTs/NAME.nii.gz

The images of `test` come without labels and are given to `test`: pretraining leaves them alone.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field

from imaging.datasets.files import Files
from imaging.datasets.plan import Case, LayoutError, Options, Plan, by_slug, slug
from imaging.datasets.tables import document


class Pair(BaseModel):
    """An image with its labels, as `training` lists them."""

    model_config = ConfigDict(frozen=True)

    image: str
    label: str


class Description(BaseModel):
    """What is used of a `dataset.json`; what else it says does not count."""

    model_config = ConfigDict(frozen=True)

    modality: dict[int, str] = Field(min_length=1)
    labels: dict[int, str]
    training: tuple[Pair, ...]
    test: tuple[str | Pair, ...] = ()


def read(folder: Path, options: Options) -> Plan:
    """The plan of a task's folder."""
    files = Files(folder)
    found = files.get("dataset.json")
    if found is None:
        raise LayoutError("not_this_layout", "no dataset.json in the folder")
    described = document(files.take(found), Description)
    channels = tuple(slug(name) for _, name in sorted(described.modality.items()))
    if len(set(channels)) < len(channels):
        raise LayoutError("bad_table", f"dataset.json: two modalities are called alike: {channels}")
    cases = [_case(files, pair.image, pair.label, len(channels)) for pair in described.training] + [
        _case(files, one if isinstance(one, str) else one.image, None, len(channels))
        for one in described.test
    ]
    return Plan(
        kind="msd",
        dims=3,
        channels=channels if len(channels) > 1 else ("image",),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        consumed=files.consumed,
        explained=files.explained,
        labels=label_values(described.labels),
    )


def label_values(names: dict[int, str]) -> dict[str, int]:
    """Value of each class but the background.

    Raises:
        LayoutError: `bad_table`: two classes are called alike.
    """
    return by_slug((name, value) for value, name in sorted(names.items()) if value != 0)


def _case(files: Files, image: str, label: str | None, num_channels: int) -> Case:
    path = files.need(image)
    name = PurePosixPath(image).name.removesuffix(".gz").removesuffix(".nii")
    places = range(num_channels) if num_channels > 1 else (None,)
    return Case(
        id=name,
        images=tuple(files.image(path, channel) for channel in places),
        patient=name,
        labels=None if label is None else files.image(files.need(label)),
        split="test" if label is None else None,
    )
