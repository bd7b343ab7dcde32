"""The gate before an alias: what a version must show before clinicians' requests reach it.

    parity   the bundle's report compares the exported network with its origin; every line passed
    card     the card is complete: `card.md` in the bundle; the data set's digest and the code's
             version in the lineage; for segmenters and classifiers a metric with n of 1 or more
    golden   the newest ended check on the golden cases, as they are now, passed; if there are any

An admin may move an alias against it, with a reason that stays in the alias' history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from models.bundle import CARD
from service import golden
from service.db import TERMINAL, ModelVersion
from service.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of the gate."""

    name: str
    passed: bool
    detail: str


def examine(session: Session, version: ModelVersion) -> tuple[Finding, ...]:
    """Every check of the gate on a version."""
    return (_parity(version.manifest), _card(version.manifest), _golden(session, version))


def require(session: Session, version: ModelVersion, *, may_override: bool) -> list[str]:
    """Refuse a version that does not pass, unless the caller may and wants to override.

    Returns:
        Names of the checks that were overridden; empty where all passed.

    Raises:
        ServiceError: 409 `gate_failed` with every check in `checks`.
    """
    findings = examine(session, version)
    unmet = [one for one in findings if not one.passed]
    if not unmet or may_override:
        return [one.name for one in unmet]
    raise ServiceError(
        409,
        "gate_failed",
        "the version may not be live: " + "; ".join(f"{one.name}: {one.detail}" for one in unmet),
        extra={
            "checks": [
                {"name": one.name, "passed": one.passed, "detail": one.detail} for one in findings
            ]
        },
    )


def _parity(manifest: dict[str, Any]) -> Finding:
    report = manifest.get("parity") or []
    failed = sum(not line.get("passed") for line in report)
    if not report:
        return Finding("parity", False, "the bundle has no parity report")
    detail = f"{failed} of {len(report)} comparisons failed" if failed else "passed"
    return Finding("parity", not failed, detail)


def _card(manifest: dict[str, Any]) -> Finding:
    lineage, metrics = manifest.get("lineage") or {}, manifest.get("metrics") or {}
    missing = [f"{key} of the lineage" for key in ("dataset_digest", "code_version")
               if not lineage.get(key)]  # fmt: skip
    if CARD not in (manifest.get("files") or {}):
        missing.append(CARD)
    if manifest.get("kind") != "encoder" and not any(one.get("n") for one in metrics.values()):
        missing.append("a metric with the number of its cases")
    if missing:
        return Finding("card", False, f"the card lacks {', '.join(missing)}")
    return Finding("card", True, "complete")


def _golden(session: Session, version: ModelVersion) -> Finding:
    num = len(golden.cases(session, version.model_name))
    if not num:
        return Finding("golden", True, "the model has no golden cases")
    ended = [one for one in golden.checks(session, version) if one.run.state in TERMINAL]
    current = [one for one in ended if one.is_current]
    if not current:
        start = f"POST /api/v1/models/{version.model_name}/versions/{version.version}:check"
        return Finding("golden", False, f"not checked on the {num} cases as they are: {start}")
    if not current[0].passed:
        return Finding("golden", False, f"the newest check, {current[0].run.id}, did not pass")
    return Finding("golden", True, f"{num} cases reproduced")
