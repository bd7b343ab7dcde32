"""Datasets: immutable, hashed lists of scans with labels or classes, split by subject.

Labels must lie on their image's grid, and a subject is in one split only: a patient who is in the
training set and in the test set would make the test worthless. The scans are volumes or 2D images:
no recipe reads both.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models.splits import SPLITS, split_by_subject
from service import volumes
from service.db import (
    Batch,
    Cursor,
    Dataset,
    DatasetItem,
    Experiment,
    Page,
    Run,
    Volume,
    new_id,
    page,
)
from service.errors import ServiceError

GEOMETRY_TOLERANCE_MM = 0.01


@dataclass(frozen=True, slots=True)
class Item:
    """A scan, perhaps with labels or classes, perhaps with the split that the caller wants.

    `classes` has 1 or 0 for each class of the whole scan; None, or a class that is not in it, is
    not known.
    """

    volume_id: str
    labels_id: str | None = None
    split: str | None = None
    classes: Mapping[str, int | None] | None = None

    @property
    def known(self) -> dict[str, int] | None:
        """The classes that are known, if any."""
        found = {name: value for name, value in (self.classes or {}).items() if value is not None}
        return found or None


@dataclass(frozen=True, slots=True)
class Split:
    """Shares of subjects; they are scaled to sum to one."""

    train: float = 0.7
    val: float = 0.1
    test: float = 0.2
    seed: int = 0


def create(
    session: Session,
    *,
    name: str,
    items: Sequence[Item],
    split: Split = Split(),
    principal: str,
) -> Dataset:
    """Make a dataset; the caller commits.

    Raises:
        ServiceError: 404 `not_found` (a volume), 422 `wrong_volume_kind` (no image, or not what the
            first item is), `label_shape_mismatch`, `label_geometry_mismatch`,
            `split_leaks_subject`, `invalid_request` (no item, a volume twice).
    """
    images = _images(session, items)
    if not items or len({image.id for image in images}) < len(images):
        raise ServiceError(
            422, "invalid_request", "a dataset has at least one volume, and each of them once"
        )
    labels = [
        volumes.get(session, item.labels_id, kind="labels") if item.labels_id else None
        for item in items
    ]
    for image, label in zip(images, labels, strict=True):
        if label is not None:
            check_labels(image, label)
    split_of = _splits(items, images, split)
    rows = [
        DatasetItem(
            position=position,
            volume_id=image.id,
            labels_id=label.id if label is not None else None,
            classes=item.known,
            subject=image.subject,
            split=split_of[image.subject],
        )
        for position, (item, image, label) in enumerate(zip(items, images, labels, strict=True))
    ]
    dataset = Dataset(
        id=new_id("ds"),
        name=name,
        digest=_digest(zip(rows, images, labels, strict=True)),
        created_by=principal,
    )
    session.add(dataset)
    session.flush()
    for row in rows:
        row.dataset_id = dataset.id
    session.add_all(rows)
    session.flush()
    return dataset


def get(session: Session, dataset_id: str) -> Dataset:
    """A dataset by id.

    Raises:
        ServiceError: 404 `not_found`.
    """
    dataset = session.get(Dataset, dataset_id)
    if dataset is None:
        raise ServiceError(404, "not_found", "no dataset has this id")
    return dataset


def items_of(session: Session, dataset_id: str) -> Sequence[DatasetItem]:
    """The dataset's items in their order."""
    return session.scalars(
        select(DatasetItem)
        .where(DatasetItem.dataset_id == dataset_id)
        .order_by(DatasetItem.position)
    ).all()


def require_kind(session: Session, dataset_id: str, kind: str) -> None:
    """Refuse a dataset of other scans than of this kind: `image` or `image_2d`.

    Raises:
        ServiceError: 422 `wrong_volume_kind`, naming the first scan.
    """
    other = session.scalars(
        select(Volume)
        .join(DatasetItem, DatasetItem.volume_id == Volume.id)
        .where(DatasetItem.dataset_id == dataset_id, Volume.kind != kind)
        .order_by(DatasetItem.position)
        .limit(1)
    ).first()
    if other is not None:
        raise volumes.wrong_kind(other, kind)


def listing(session: Session, *, size: int = 50, after: Cursor | None = None) -> Page[Dataset]:
    """Datasets, newest first."""
    return page(session, Dataset, size=size, after=after)


def delete(session: Session, dataset_id: str) -> None:
    """Delete a dataset, not its volumes; the caller commits.

    Raises:
        ServiceError: 404 `not_found`; 409 `dataset_in_use` if runs, batches or experiments refer
            to it.
    """
    dataset = get(session, dataset_id)
    uses = {
        "runs": select(func.count()).select_from(Run).where(Run.dataset_id == dataset_id),
        "batches": select(func.count()).select_from(Batch).where(Batch.dataset_id == dataset_id),
        "experiments": select(func.count())
        .select_from(Experiment)
        .where(
            or_(
                Experiment.source_dataset_id == dataset_id,
                Experiment.target_dataset_id == dataset_id,
            )
        ),
    }
    found = {name: session.scalar(count) or 0 for name, count in uses.items()}
    if any(found.values()):
        counts = " and ".join(f"{number} {name}" for name, number in found.items() if number)
        raise ServiceError(409, "dataset_in_use", f"{counts} refer to the dataset")
    session.delete(dataset)
    try:
        session.flush()
    except IntegrityError:  # a run or a batch took it meanwhile
        session.rollback()
        raise ServiceError(409, "dataset_in_use", "a run refers to the dataset") from None


def check_labels(image: Volume, labels: Volume) -> None:
    """Refuse labels that do not lie on their image's grid.

    Raises:
        ServiceError: 422 `label_shape_mismatch` or `label_geometry_mismatch`, with what was
            found and what was expected (shape, or affine in mm).
    """
    if labels.shape != image.shape:
        raise ServiceError(
            422,
            "label_shape_mismatch",
            f"labels {labels.id} have shape {tuple(labels.shape)}; their image {image.id} has "
            f"{tuple(image.shape)}",
            extra={"found": labels.shape, "expected": image.shape},
        )
    distance = _corner_distance_mm(image, labels)
    if distance > GEOMETRY_TOLERANCE_MM:
        raise ServiceError(
            422,
            "label_geometry_mismatch",
            f"a corner of labels {labels.id} is {distance:.3f} mm away from that of their image "
            f"{image.id}; at most {GEOMETRY_TOLERANCE_MM} mm is allowed",
            extra={"found": labels.affine, "expected": image.affine},
        )


def _images(session: Session, items: Sequence[Item]) -> list[Volume]:
    """What the items are of; the first says whether all are volumes or all 2D images."""
    images: list[Volume] = []
    for item in items:
        image = volumes.get(session, item.volume_id)
        is_2d = image.kind == "image_2d" if not images else images[0].kind == "image_2d"
        kind = "image_2d" if is_2d else "image"
        if image.kind != kind:
            raise volumes.wrong_kind(image, kind)
        images.append(image)
    return images


def _splits(items: Sequence[Item], images: Sequence[Volume], split: Split) -> dict[str, str]:
    """Split of every subject: as asked where items say so, the rest by share."""
    asked: dict[str, str] = {}
    has_labels: dict[str, bool] = defaultdict(bool)
    for item, image in zip(items, images, strict=True):
        has_finding = 1 in (item.known or {}).values()
        has_labels[image.subject] |= item.labels_id is not None or has_finding
        if item.split is None:
            continue
        if item.split not in SPLITS:
            raise ServiceError(422, "invalid_request", f"a split is one of {', '.join(SPLITS)}")
        other = asked.setdefault(image.subject, item.split)
        if other != item.split:
            raise ServiceError(
                422,
                "split_leaks_subject",
                f"a subject is asked to be in {other} and in {item.split}",
                extra={"volume_id": image.id, "found": item.split, "expected": other},
            )
    open_subjects = {name: has for name, has in has_labels.items() if name not in asked}
    taken = {name: list(asked.values()).count(name) for name in SPLITS}
    shares = {"train": split.train, "val": split.val, "test": split.test}
    try:
        return asked | split_by_subject(open_subjects, shares, split.seed, taken=taken)
    except ValueError as error:
        raise ServiceError(422, "invalid_request", str(error)) from None


def _corner_distance_mm(image: Volume, labels: Volume) -> float:
    """Largest distance between corresponding corner voxels, mm."""
    last = np.array(image.shape, dtype=np.float64) - 1
    corners = np.array(np.meshgrid(*zip((0, 0, 0), last, strict=True))).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
    apart = (np.array(image.affine) - np.array(labels.affine)) @ homogeneous
    return float(np.linalg.norm(apart[:3], axis=0).max())


def _digest(rows: Iterable[tuple[DatasetItem, Volume, Volume | None]]) -> str:
    """SHA-256 over what training sees: voxels, geometry, labels, classes, subjects and split."""
    content: list[Any] = [
        {
            "image": image.voxels_sha256,
            "affine": image.affine,
            "labels": labels.voxels_sha256 if labels is not None else None,
            "subject": item.subject,
            "split": item.split,
            **({"classes": item.classes} if item.classes else {}),  # older digests have none
        }
        for item, image, labels in rows
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
