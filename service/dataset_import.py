"""A public data set from its maker's layout into a service, by its REST API like any client.

Sending is safe to repeat: the same image becomes the same bytes, which the service knows again. So
an import that was killed goes on where it was, one scan being read once more at most.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from imaging.datasets import Case, Image, LayoutError, Plan
from imaging.datasets.shipping import as_one_file
from imaging.errors import ScanError
from service import schemas
from service.answers import ApiError
from service.client import Client
from service.client.scans import Item
from service.schemas.datasets import MAX_ITEMS

_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OF_THE_SCAN = frozenset({413, 415, 422})
"""Statuses that say something of one scan; others would meet every scan."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A case that the service did not take."""

    case: str
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Sent:
    """What the service has of a plan.

    Attributes:
        items: Volume, labels, split and classes, as `Client.create_dataset` takes them.
        refused: Cases that are not among them.
    """

    items: tuple[Item, ...]
    refused: tuple[Refused, ...]


def check_held(plan: Plan) -> tuple[str, ...]:
    """What of the plan is lost in the service.

    It holds volumes of one channel and 2D images, with label maps and classes of whole scans.

    Raises:
        LayoutError: `not_held`: nothing sensible would be left.
    """
    shell = f"python -m trainer dataset {plan.kind} DIR --out DIR"
    if len(plan.cases) > MAX_ITEMS:
        raise LayoutError(
            "not_held",
            f"a dataset of the service has {MAX_ITEMS} scans at most, this has {len(plan.cases)}; "
            f"a training in a shell reads all ({shell})",
        )
    if len(plan.channels) > 1:
        raise LayoutError(
            "not_held",
            f"a scan of the service has one channel, these have {', '.join(plan.channels)}; take "
            f"one with --channel, or all in a shell ({shell})",
        )
    lost = []
    places = [one for case in plan.cases for one in case.findings if one.centre_mm is not None]
    if places:
        lost.append(
            f"{len(places)} findings at places ({', '.join(plan.classes)}) stay behind; see {shell}"
        )
    if plan.regions:
        lost.append(f"label values are kept, the regions {', '.join(plan.regions)} are a recipe's")
    return tuple(lost)


def send(client: Client, plan: Plan, on_case: Callable[[int, int], None] | None = None) -> Sent:
    """Upload every case of a plan that `check_held` lets pass.

    Args:
        client: Of a token that may upload.
        plan: What to send.
        on_case: Told how many of how many cases are done.

    Raises:
        ApiError: What has nothing to do with one scan: no room, no right, no answer.
    """
    items: dict[str, Item] = {}
    refused: list[Refused] = []
    for done, case in enumerate(plan.cases, start=1):
        found = _case(client, plan, case)
        if isinstance(found, Refused):
            refused.append(found)
        elif found[0] in items:
            refused.append(Refused(case.id, "duplicate", "the same bytes as a case before"))
        else:
            items[found[0]] = found
        if on_case is not None:
            on_case(done, len(plan.cases))
    return Sent(tuple(items.values()), tuple(refused))


def make_dataset(client: Client, name: str, plan: Plan, sent: Sent) -> schemas.Dataset:
    """The dataset of what was sent; patients without a given split are split by the service.

    A data set that comes with a test split keeps it as it is: nobody else goes there.
    """
    split = schemas.SplitCreate(test=0.0) if plan.has_test else schemas.SplitCreate()
    return client.create_dataset(name, sent.items, split=split)


def subject_of(kind: str, patient: str) -> str:
    """The patient's pseudonym in the service: other data sets count their patients from 0 too."""
    name = f"{kind}-{patient}"
    if _SUBJECT.fullmatch(name):
        return name
    return f"{kind}-{hashlib.sha256(patient.encode()).hexdigest()[:32]}"


def _case(client: Client, plan: Plan, case: Case) -> Item | Refused:
    subject = subject_of(plan.kind, case.patient)
    try:
        kind: schemas.VolumeKind = "image_2d" if plan.dims == 2 else "image"
        image = _volume(client, case.images[0], kind, subject)
        labels = _volume(client, case.labels, "labels", subject) if case.labels else None
    except ScanError as error:
        return Refused(case.id, error.code, error.detail)
    except ApiError as error:
        if error.status not in _OF_THE_SCAN:
            raise
        return Refused(case.id, error.code, error.detail)
    whole = [one.classes for one in case.findings if one.centre_mm is None]
    classes = {name: value for known in whole for name, value in known.items()}
    return image, labels, case.split, classes or None


def _volume(client: Client, image: Image, kind: schemas.VolumeKind, subject: str) -> str:
    with as_one_file(image) as path:
        return client.upload(path, kind=kind, subject=subject).id
