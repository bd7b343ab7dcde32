"""Whether a dataset can be trained on as a recipe asks: what could only fail later is refused."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from models.recipe import AnyClassify, AnyRecipe, FinetuneRecipe
from service import datasets
from service.db import DatasetItem
from service.errors import ServiceError


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
    for split in ("train", "test") if judged else ("train",):
        mine = [item for item in items if item.split == split]
        if isinstance(recipe, FinetuneRecipe):
            _require_labels(mine, split)
        elif isinstance(recipe, AnyClassify):
            _require_classes(mine, split, recipe)


def _require_labels(items: Sequence[DatasetItem], split: str) -> None:
    if not any(item.labels_id is not None for item in items):
        raise _without(f"none of the {len(items)} scans in the {split} split has a label volume")


def _require_classes(items: Sequence[DatasetItem], split: str, recipe: AnyClassify) -> None:
    """Training has scans with each label and without it; the test has some that are known."""
    known: dict[str, set[int]] = {
        label: {classes[label] for item in items if label in (classes := item.classes or {})}
        for label in recipe.labels
    }
    if split == "train":
        for label, values in known.items():
            if values != {0, 1}:
                raise _without(
                    f"{label} needs scans with it (1) and without it (0) in the train split; of "
                    f"{len(items)} scans there are those of {sorted(values) or 'neither'}"
                )
    elif not any(known.values()):
        raise _without(
            f"none of the {len(items)} scans in the {split} split has a known value of "
            f"{', '.join(recipe.labels)}"
        )


def _without(detail: str) -> ServiceError:
    return ServiceError(422, "dataset_without_labels", detail)
