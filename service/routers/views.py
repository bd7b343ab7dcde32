"""Rows as the API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service import db, golden, schemas


def volume(row: db.Volume, size_bytes: int) -> schemas.Volume:
    """A volume with the size of the file that was sent."""
    return schemas.Volume.model_validate(
        {
            "id": row.id,
            "kind": row.kind,
            "subject": row.subject,
            "modality": row.modality,
            "format": row.format,
            "shape": row.shape,
            "spacing_mm": row.spacing_mm or None,  # a 2D image has none
            "affine": row.affine or None,
            "source_shape": row.source_shape,
            "source_affine": row.source_affine or None,
            "sha256": row.original_sha256,
            "size_bytes": size_bytes,
            "skipped": row.intake.get("members", []),
            "num_used": len(row.intake.get("used", [])),
            "notes": row.intake.get("notes", []),
            "created_at": row.created_at,
        }
    )


def dataset_summary(row: db.Dataset) -> schemas.DatasetSummary:
    """A dataset without its items."""
    return schemas.DatasetSummary(
        id=row.id, name=row.name, digest=row.digest, created_at=row.created_at
    )


def dataset(row: db.Dataset, items: Sequence[db.DatasetItem]) -> schemas.Dataset:
    """A dataset with its items."""
    return schemas.Dataset.model_validate(
        {
            **dataset_summary(row).model_dump(),
            "items": [
                {
                    "volume_id": item.volume_id,
                    "labels_id": item.labels_id,
                    "classes": item.classes,
                    "subject": item.subject,
                    "split": item.split,
                }
                for item in items
            ],
        }
    )


def run(row: db.Run, *, queue_position: int | None = None) -> schemas.Run:
    """A run of any kind."""
    made = (row.result or {}).get("model")
    return schemas.Run.model_validate(
        {
            **_lifecycle(row),
            "id": row.id,
            "kind": row.kind,
            "dataset_id": row.dataset_id,
            "volume_id": row.volume_id,
            "model_name": row.spec.get("model_name"),
            "parent": row.spec.get("parent_ref"),
            "parent_digest": row.spec.get("parent"),
            "recipe": row.spec.get("recipe"),
            "model": row.spec.get("model") or made,
            "result": row.result,
            "attempt": row.attempt,
            "priority": row.priority,
            "requires": {
                "device": row.needs_device or None,
                "memory_bytes": row.needs_memory_bytes,
            },
            "queue_position": queue_position,
        }
    )


def segmentation(row: db.Run) -> schemas.Segmentation:
    """A run of kind `segment`."""
    return schemas.Segmentation.model_validate({**_inference(row), "result": row.result})


def embedding(row: db.Run) -> schemas.Embedding:
    """A run of kind `embed`."""
    return schemas.Embedding.model_validate({**_inference(row), "result": row.result})


def model_summary(row: db.Model) -> schemas.ModelSummary:
    """A model without its versions."""
    return schemas.ModelSummary.model_validate(
        {"name": row.name, "kind": row.kind, "created_at": row.created_at}
    )


def model(
    row: db.Model, versions: Sequence[db.ModelVersion], aliases: Sequence[db.ModelAlias]
) -> schemas.Model:
    """A model with its versions and aliases."""
    return schemas.Model.model_validate(
        {
            **model_summary(row).model_dump(),
            "versions": [
                {
                    "version": version.version,
                    "digest": version.digest,
                    "run_id": version.run_id,
                    "created_at": version.created_at,
                }
                for version in versions
            ],
            "aliases": [alias(one) for one in aliases],
        }
    )


def model_version(row: db.ModelVersion) -> schemas.ModelVersion:
    """One version with its manifest."""
    return schemas.ModelVersion.model_validate(
        {
            "name": row.model_name,
            "version": row.version,
            "digest": row.digest,
            "kind": row.manifest["kind"],
            "run_id": row.run_id,
            "manifest": row.manifest,
            "created_at": row.created_at,
        }
    )


def alias(row: db.ModelAlias) -> schemas.Alias:
    """One alias."""
    return schemas.Alias(
        alias=row.alias, version=row.version, revision=row.revision, updated_at=row.updated_at
    )


def past_alias(row: db.AliasEvent) -> schemas.Alias:
    """Where an alias pointed after one of its moves."""
    assert row.version is not None  # a removed alias is not shown
    return schemas.Alias(
        alias=row.alias, version=row.version, revision=None, updated_at=row.created_at
    )


def alias_move(row: db.AliasEvent) -> schemas.AliasMove:
    """One move of an alias."""
    return schemas.AliasMove.model_validate(
        {
            "id": row.seq,
            "alias": row.alias,
            "version": row.version,
            "cause": row.cause,
            "set_by": row.set_by,
            "override_reason": row.override_reason,
            "unmet": row.unmet or [],
            "created_at": row.created_at,
        }
    )


def golden_case(row: db.GoldenCase) -> schemas.GoldenCase:
    """A golden case of a model."""
    return schemas.GoldenCase(
        name=row.name,
        volume_id=row.volume_id,
        labels_id=row.labels_id,
        expected=row.expected,
        updated_at=row.updated_at,
    )


def version_check(one: golden.Checked) -> schemas.VersionCheck:
    """A check of a version."""
    return schemas.VersionCheck.model_validate(
        {
            "id": one.run.id,
            "state": one.run.state,
            "passed": one.passed,
            "is_current": one.is_current,
            "golden_digest": one.run.spec["golden_digest"],
            "cases": (one.run.result or {}).get("cases", []),
            "error": one.run.error,
            "created_at": one.run.created_at,
        }
    )


def _lifecycle(row: db.Run) -> dict[str, Any]:
    return {
        "state": row.state,
        "progress": row.progress,
        "error": row.error,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
    }


def _inference(row: db.Run) -> dict[str, Any]:
    return {
        **_lifecycle(row),
        "id": row.id,
        "volume_id": row.volume_id,
        "model": row.spec["model"],
    }
