"""The registry: versions, aliases, golden cases, cascades, bundles in and out."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from service import schemas
from service.client.runs import OnEvent, Runs


class Models(Runs):
    """Models of the service."""

    def models(self) -> list[schemas.ModelSummary]:
        """Every model by name, without versions."""
        return list(self._pages("models", schemas.ModelPage, {}))

    def model(self, name: str) -> schemas.Model:
        """A model with its versions and aliases."""
        return self._get(f"models/{name}", schemas.Model)

    def model_version(self, name: str, version: int) -> schemas.ModelVersion:
        """One version with its manifest."""
        return self._get(f"models/{name}/versions/{version}", schemas.ModelVersion)

    def create_cascade(
        self,
        name: str,
        fine: str,
        organ: str,
        *,
        coarse: str | None = None,
        parts: Sequence[str] | None = None,
        margin_mm: float | None = None,
        coarse_spacing_mm: float | None = None,
        min_organ_ml: float = 1.0,
    ) -> schemas.ModelVersion:
        """Compose a segmenter of two passes of registered ones, as a new version of a model.

        Args:
            name: The model that gets the version.
            fine: The segmenter that makes the mask.
            organ: What is looked for first: a label of the model that finds it.
            coarse: The segmenter that finds it; `fine` itself if None.
            parts: Labels that lie in the organ and count as it.
            margin_mm: Around the organ's box; the service's choice if None.
            coarse_spacing_mm: Of the first pass, where `fine` does it; 4 mm if None.
            min_organ_ml: An organ smaller than this counts as not found.
        """
        body = {
            "fine": fine,
            "coarse": coarse,
            "organ": organ,
            "parts": list(parts) if parts is not None else None,
            "margin_mm": margin_mm,
            "coarse_spacing_mm": coarse_spacing_mm,
            "min_organ_ml": min_organ_ml,
        }
        return self._create(f"models/{name}/versions:cascade", body, schemas.ModelVersion)

    def set_alias(
        self, name: str, alias: str, version: int, *, revision: int | None = None
    ) -> schemas.Alias:
        """Point an alias at a version; with `revision`, only if it still has that one."""
        headers = {"If-Match": f'"{revision}"'} if revision is not None else {}
        path = f"models/{name}/aliases/{alias}"
        answer = self._once(
            "PUT", path, json={"version": version}, headers=headers, timeout=self._patient
        )
        return schemas.Alias.model_validate_json(answer.content)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self._once("DELETE", f"models/{name}/aliases/{alias}")

    def alias_at(self, name: str, alias: str, at: datetime) -> schemas.Alias:
        """Where an alias pointed at a time (aware)."""
        params = {"at": at.isoformat()}
        return self._get(f"models/{name}/aliases/{alias}", schemas.Alias, params)

    def alias_history(self, name: str, alias: str) -> list[schemas.AliasMove]:
        """Every move of an alias, newest first."""
        return list(self._pages(f"models/{name}/aliases/{alias}/history", schemas.AliasMoves, {}))

    def rollback(self, name: str, alias: str) -> schemas.Alias:
        """Point an alias at the version before, unless somebody moves it at the same moment."""
        path = f"models/{name}/aliases/{alias}"
        seen = self._get(path, schemas.Alias)
        headers = {"If-Match": f'"{seen.revision}"'}
        answer = self._once("POST", f"{path}:rollback", headers=headers, timeout=self._patient)
        return schemas.Alias.model_validate_json(answer.content)

    def set_golden_case(
        self,
        name: str,
        case: str,
        volume_id: str,
        *,
        labels_id: str | None = None,
        labels: Sequence[Mapping[str, Any]] = (),
        vector: Sequence[float] = (),
        min_cosine: float = 0.999,
    ) -> schemas.GoldenCase:
        """Make or replace a golden case: labels (`{name, value, min_dice}`), or a vector."""
        body = {
            "volume_id": volume_id,
            "labels_id": labels_id,
            "labels": [dict(one) for one in labels],
            "vector": list(vector),
            "min_cosine": min_cosine,
        }
        answer = self._again("PUT", f"models/{name}/golden/{case}", json=body)
        return schemas.GoldenCase.model_validate_json(answer.content)

    def golden_cases(self, name: str) -> list[schemas.GoldenCase]:
        """The golden cases of a model."""
        return list(self._pages(f"models/{name}/golden", schemas.GoldenCases, {}))

    def check_version(self, name: str, version: int, *, wait: bool = True) -> schemas.Run:
        """Hold a version to the golden cases, and wait for the end unless told otherwise."""
        run = self._create(f"models/{name}/versions/{version}:check", {}, schemas.Run)
        return self.wait(run.id) if wait else run

    def version_checks(self, name: str, version: int) -> list[schemas.VersionCheck]:
        """The newest checks of a version."""
        path = f"models/{name}/versions/{version}/checks"
        return list(self._pages(path, schemas.VersionChecks, {}))

    def import_model(
        self,
        path: Path,
        name: str,
        *,
        wait: bool = True,
        on_event: OnEvent | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> schemas.Run:
        """Send a model from elsewhere (zip or tar) to become a version of `name`.

        Args:
            path: A bundle as `download_bundle` saves it, or `model.onnx` with `manifest.json`.
            name: What it becomes a version of.
            wait: Return when it was opened and registered, or refused.
            on_event: Told every event.
            on_progress: Told the number of bytes that were sent.
        """
        answer = self._send(
            "/models:import",
            path,
            params={"name": name},
            on_progress=on_progress,
            headers={"Idempotency-Key": uuid.uuid4().hex},
        )
        run = schemas.Run.model_validate_json(answer.content)
        return self.wait(run.id, on_event) if wait else run

    def download_bundle(self, name: str, version: int, path: Path) -> None:
        """Save a model as a zip archive."""
        self._download(f"models/{name}/versions/{version}/bundle", path)
