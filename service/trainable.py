"""Whether a dataset can be trained on as a recipe asks: what could only fail later is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

from models.recipe import AnyClassify, AnyRecipe, FinetuneRecipe
from models.recipe.finetune import LEAST_MEMBERS
from service import datasets
from service.db import DatasetItem
from service.errors import ServiceError

Classes = Mapping[str, int]


def require(session: Session, dataset_id: str, recipe: AnyRecipe, *, judged: bool = False) -> None:
    """Refuse a dataset that does not fit a recipe.

    Args:
        session: Database session.
        dataset_id: The dataset.
        recipe: Of the training.
        judged: Whether the test split must have labels too.

    Raises:
        ServiceError: 422 `wrong_volume_kind`, naming a scan: volumes where the network reads 2D
            images, or the reverse; 422 `dataset_without_labels`.
    """
    datasets.require_kind(session, dataset_id, "image_2d" if recipe.network.dims == 2 else "image")
    items = datasets.items_of(session, dataset_id)
    if isinstance(recipe, FinetuneRecipe):
        for split in ("train", "test") if judged else ("train",):
            _require_labels([item for item in items if item.split == split], split)
    elif isinstance(recipe, AnyClassify):
        known = {split: _classes(items, split) for split in ("train", "val", "test")}
        _require_exclusive(known, recipe)
        _require_members(known["train"], recipe)
        _require_both(known, "val" if known["val"] else "train", recipe)
        if judged:
            _require_both(known, "test", recipe)


def _require_labels(items: Sequence[DatasetItem], split: str) -> None:
    if not any(item.labels_id is not None for item in items):
        raise _without(f"none of the {len(items)} scans in the {split} split has a label volume")


def _classes(items: Sequence[DatasetItem], split: str) -> list[Classes]:
    """Of a split's scans of which something is known."""
    return [item.classes for item in items if item.split == split and item.classes]


def _require_members(known: Sequence[Classes], recipe: AnyClassify) -> None:
    """The trainer's own rule (`trainer.classification`), before anything is queued."""
    for label in recipe.labels:
        counts = Counter(classes[label] for classes in known if label in classes)
        if min(counts[0], counts[1]) < LEAST_MEMBERS:
            raise _without(
                f"{label} needs {LEAST_MEMBERS} scans with it (1) and {LEAST_MEMBERS} without it "
                f"(0) in the train split; there are {counts[1]} and {counts[0]}"
            )


def _require_both(known: Mapping[str, Sequence[Classes]], split: str, recipe: AnyClassify) -> None:
    """What judges has scans with some label and without it; else no AUC can be told."""
    for label in recipe.labels:
        if {0, 1} == {classes[label] for classes in known[split] if label in classes}:
            return
    raise _without(
        f"of none of {', '.join(recipe.labels)} the {split} split, which judges, has scans with it "
        f"(1) and without it (0)"
    )


def _require_exclusive(known: Mapping[str, Sequence[Classes]], recipe: AnyClassify) -> None:
    if not recipe.exclusive:
        return
    for split, rows in known.items():
        for classes in rows:
            found = [classes.get(label) for label in recipe.labels]
            if sorted(found, key=str) != [*([0] * (len(found) - 1)), 1]:
                raise _without(
                    f"a scan in the {split} split has {classes}: of exclusive labels one must be 1 "
                    "and the others 0"
                )


def _without(detail: str) -> ServiceError:
    return ServiceError(422, "dataset_without_labels", detail)
