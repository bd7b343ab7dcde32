"""What a reader of a data set says: cases, and of every file whether it is used or why not.

Places are RAS+ mm, whatever the data set's own tables use.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

Split = Literal["train", "val", "test"]
Point = tuple[float, float, float]
Value = TypeVar("Value")


class LayoutError(Exception):
    """A folder that is not the data set it is said to be.

    Args:
        code: Stable slug for programs.
        detail: What was found and what was expected; names files below the folder.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Options:
    """What no reader can know.

    Attributes:
        channel: The one to import of a data set of several; None imports all.
        uncertain: What CheXpert's -1 becomes: left out of loss and measures (U-Ignore of Irvin et
            al., 2019), 0 (U-Zeros) or 1 (U-Ones).
        unmentioned: What an empty cell of CheXpert becomes; the report did not speak of it.
        views: Which of CheXpert's radiographs are imported.
    """

    channel: str | None = None
    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"
    unmentioned: Literal["zeros", "ignore"] = "zeros"
    views: Literal["frontal", "lateral", "all"] = "frontal"


DEFAULT = Options()


@dataclass(frozen=True, slots=True)
class Image:
    """One channel of a case.

    Attributes:
        path: Its file, or the header of a pair.
        voxels: The file with the voxels of a detached header.
        channel: Its place along the fourth axis of a 4D file; None is all of a 3D one.
    """

    path: Path
    voxels: Path | None = None
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of an image, or of one place in it.

    Attributes:
        classes: 1 or 0 for each class; one that is not in it is not known.
        centre_mm: Where, RAS+; None is the whole image.
    """

    classes: Mapping[str, int]
    centre_mm: Point | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One scan, or one 2D image.

    Attributes:
        id: Distinct within the plan; letters, digits, `_`, `-` and `.`.
        images: One a channel, in the order of the plan's channels.
        labels: The label volume.
        patient: Cases of one patient belong into one split.
        split: Where the data set says so; None leaves it to whoever imports.
        findings: Of a classification.
    """

    id: str
    images: tuple[Image, ...]
    patient: str
    labels: Image | None = None
    split: Split | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def has_truth(self) -> bool:
        """Whether there is something to learn or to judge by."""
        return self.labels is not None or bool(self.findings)


@dataclass(frozen=True, slots=True)
class Plan:
    """A data set, ready to be imported.

    Attributes:
        kind: The reader.
        dims: Volumes or 2D images.
        channels: Names of the images of each case, as in a recipe.
        cases: In the order of their ids.
        labels: Name and value of each class of the label volumes.
        regions: Unions of label values, where the data set defines its targets so.
        classes: Names in the findings.
        consumed: Every file that is used.
        explained: Every other file below the folder, and why it is not.
        notes: What a user should know before training on it.
    """

    kind: str
    dims: Literal[2, 3]
    channels: tuple[str, ...]
    cases: tuple[Case, ...]
    consumed: frozenset[Path]
    explained: Mapping[Path, str]
    labels: Mapping[str, int] = field(default_factory=dict)
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would spoil every result: no case, two of one id, a patient in two splits."""
        if not self.cases:
            raise LayoutError("not_this_layout", f"no case of the {self.kind} layout was found")
        twice = [name for name, count in Counter(c.id for c in self.cases).items() if count > 1]
        if twice:
            raise LayoutError("bad_table", f"case {twice[0]} is there twice")
        split_of: dict[str, Split] = {}
        for case in self.cases:
            assert len(case.images) == len(self.channels)
            if case.split is None:
                continue
            other = split_of.setdefault(case.patient, case.split)
            if other != case.split:
                raise LayoutError(
                    "split_leaks_patient",
                    f"case {case.id}: its patient is given to {other} and to {case.split}",
                )

    @property
    def has_test(self) -> bool:
        """Whether the data set comes with a test split that something can be measured on."""
        return any(case.split == "test" and case.has_truth for case in self.cases)

    def of_channel(self, name: str) -> Plan:
        """The plan with one channel a case; files of the others are explained.

        Raises:
            LayoutError: `no_such_channel`.
        """
        if name not in self.channels:
            known = ", ".join(self.channels)
            raise LayoutError("no_such_channel", f"no channel is called {name}; there are {known}")
        at = self.channels.index(name)
        cases = tuple(replace(case, images=(case.images[at],)) for case in self.cases)
        kept = {file for case in cases for image in case.images for file in files_of(image)}
        dropped = {
            file
            for case in self.cases
            for image in case.images
            for file in files_of(image)
            if file not in kept
        }
        return replace(
            self,
            channels=(name,),
            cases=cases,
            consumed=self.consumed - dropped,
            explained={**self.explained, **dict.fromkeys(dropped, "of a channel not asked for")},
        )


def files_of(image: Image) -> tuple[Path, ...]:
    """The file of an image, or header and voxels."""
    return (image.path,) if image.voxels is None else (image.path, image.voxels)


def by_slug(named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """What belongs to names, by their slugs.

    Raises:
        LayoutError: `bad_table`: two names have one slug, or one has none.
    """
    found: dict[str, tuple[str, Value]] = {}
    for name, value in named:
        key = slug(name)
        if key in found:
            both = f"{found[key][0]!r} and {name!r}"
            raise LayoutError("bad_table", f"labels {both} are called alike: {key}")
        found[key] = (name, value)
    return {key: value for key, (_, value) in found.items()}


def slug(text: str) -> str:
    """A name as a recipe wants it: lower case, digits and `_`, a letter first, 32 at most."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    if not name:
        raise LayoutError("bad_table", f"{text!r} is no name")
    return (name if name[0].isalpha() else f"c_{name}")[:32].rstrip("_")
