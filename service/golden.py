"""Golden cases: scans whose answer is known, which every new version of a model must reproduce.

A case belongs to a model's name. A check is a run on the worker that segments or embeds each case
as any other scan is, and compares: Dice for each label, or the cosine of the vectors. It holds for
the cases as they were, by the digest of all of them: one that changes makes every check void.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import registry, volumes
from service.datasets import check_labels
from service.db import GoldenCase, ModelVersion, Run, VersionCheck, db_now
from service.errors import ServiceError
from service.runs import create

MAX_CASES = 100


@dataclass(frozen=True, slots=True)
class Checked:
    """A check of a version, and whether it still counts."""

    run: Run
    is_current: bool
    """Whether the golden cases are those that it ran on."""

    @property
    def passed(self) -> bool:
        """Whether it ended, every case was reproduced, and no case has changed since."""
        return self.is_current and bool((self.run.result or {}).get("passed"))


def cases(session: Session, name: str) -> Sequence[GoldenCase]:
    """The golden cases of a model, by name."""
    return session.scalars(
        select(GoldenCase).where(GoldenCase.model_name == name).order_by(GoldenCase.name)
    ).all()


def get(session: Session, name: str, case: str) -> GoldenCase:
    """One golden case.

    Raises:
        ServiceError: 404 `not_found`.
    """
    found = _find(session, name, case)
    if found is None:
        raise ServiceError(404, "not_found", "the model has no such golden case")
    return found


def _find(session: Session, name: str, case: str) -> GoldenCase | None:
    named = select(GoldenCase).where(GoldenCase.model_name == name, GoldenCase.name == case)
    return session.scalars(named).one_or_none()


def put(
    session: Session,
    name: str,
    case: str,
    *,
    volume_id: str,
    labels_id: str | None,
    expected: dict[str, Any],
    principal: str,
) -> tuple[GoldenCase, bool]:
    """Make or replace a case; the caller commits.

    Args:
        session: Database session.
        name: A model.
        case: Name of the case.
        volume_id: The scan.
        labels_id: Of a segmenter: the expected mask, on the scan's grid.
        expected: As `db.GoldenCase.expected`.
        principal: Id of who does it.

    Returns:
        The case, and whether it is new.

    Raises:
        ServiceError: 404 `not_found`; 409 `too_many_golden_cases`; 422 `wrong_model_kind`,
            `wrong_volume_kind`, `label_shape_mismatch`, `label_geometry_mismatch`.
    """
    model = registry.get(session, name)
    needed = "segmenter" if labels_id is not None else "encoder"
    if model.kind != needed:
        raise ServiceError(
            422,
            "wrong_model_kind",
            f"this case is one of a {needed}; the model is of kind {model.kind}",
            extra={"found": model.kind, "expected": needed},
        )
    image = volumes.get(session, volume_id, kind=_kind_read(session, name))
    if labels_id is not None:
        check_labels(image, volumes.get(session, labels_id, kind="labels"))
    there = _find(session, name, case)
    if there is None and len(cases(session, name)) >= MAX_CASES:
        raise ServiceError(
            409, "too_many_golden_cases", f"a model has at most {MAX_CASES} golden cases"
        )
    row = there or GoldenCase(model_name=name, name=case)
    row.volume_id, row.labels_id, row.expected = volume_id, labels_id, expected
    row.set_by, row.updated_at = principal, db_now()
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, there is None


def _kind_read(session: Session, name: str) -> str:
    """The kind of scan that the model's newest version reads."""
    found = registry.versions(session, name)
    return "image_2d" if found and registry.reads_2d(found[0]) else "image"


def delete(session: Session, name: str, case: str) -> None:
    """Remove a case; the caller commits.

    Raises:
        ServiceError: 404 `not_found`.
    """
    session.delete(get(session, name, case))


def digest_of(found: Sequence[GoldenCase]) -> str:
    """SHA-256 over everything that the cases ask for."""
    return hashlib.sha256(json.dumps(_plain(found), sort_keys=True).encode()).hexdigest()


def start_check(session: Session, version: ModelVersion, *, principal: str) -> Run:
    """Queue a check of a version on the cases as they are now; the caller commits and rings.

    Raises:
        ServiceError: 409 `no_golden_cases`.
    """
    found = cases(session, version.model_name)
    if not found:
        raise ServiceError(
            409, "no_golden_cases", "the model has no golden case that a version could be held to"
        )
    digest = digest_of(found)
    model = {"name": version.model_name, "version": version.version, "digest": version.digest}
    run = create(
        session,
        kind="check",
        spec={"model": model, "cases": _plain(found), "golden_digest": digest},
        principal=principal,
    )
    session.add(
        VersionCheck(
            run_id=run.id,
            model_name=version.model_name,
            version=version.version,
            golden_digest=digest,
        )
    )
    session.flush()
    return run


def checks(session: Session, version: ModelVersion, *, limit: int = 50) -> list[Checked]:
    """The newest checks of a version, the newest first."""
    digest = digest_of(cases(session, version.model_name))
    rows = session.execute(
        select(VersionCheck, Run)
        .join(Run, Run.id == VersionCheck.run_id)
        .where(
            VersionCheck.model_name == version.model_name, VersionCheck.version == version.version
        )
        .order_by(VersionCheck.created_at.desc(), VersionCheck.run_id)
        .limit(limit)
    ).all()
    return [Checked(run, check.golden_digest == digest) for check, run in rows]


def _plain(found: Sequence[GoldenCase]) -> list[dict[str, Any]]:
    return [
        {
            "name": case.name,
            "volume_id": case.volume_id,
            "labels_id": case.labels_id,
            "expected": case.expected,
        }
        for case in found
    ]
