"""The REST API as typed methods, over httpx: for the command line, the demo, and scripts.

It answers with the same frozen models as the API. A refusal is an `ApiError` with the problem's
code. Creating calls carry an `Idempotency-Key`, so a connection that breaks is tried again safely.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import BaseModel

from service import schemas
from service.answers import TRANSIENT, ApiError, check, unreachable
from service.client_upload import described, send_in_pieces
from service.formats import DicomFormat, MaskFormat

__all__ = ["ApiError", "Client"]

TERMINAL = frozenset({"succeeded", "failed", "canceled"})
CHUNK_BYTES = 1 << 20
NUM_TRIES = 4
PIECES_FROM_BYTES = 8 << 20
"""Smaller files are sent whole: a break costs no more than a piece."""
PATIENCE_S = 120.0
"""How long an upload goes on asking a service that does not answer."""
POLL_S = 1.0
STREAM_TIMEOUT_S = 45.0
"""Three times the pause between the stream's pings."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

Shown = TypeVar("Shown", bound=BaseModel)
OnEvent = Callable[[schemas.Event], None]
Item = tuple[str, str | None] | tuple[str, str | None, str | None]
"""Image id, labels id or None, and perhaps the split."""


class Client:
    """One service and one token; a context manager. Safe to use from several threads."""

    def __init__(self, base_url: str, token: str, *, timeout_s: float = 60.0) -> None:
        url = httpx.URL(base_url)
        self._timeout_s = timeout_s
        self._patient = httpx.Timeout(timeout_s, read=None)  # reading a scan, loading a model
        self._http = httpx.Client(
            base_url=url.copy_with(path=url.path.rstrip("/") + "/api/v1/"),
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout_s,
            trust_env=url.host not in LOOPBACK,  # no proxy on the way to this machine
        )

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def capabilities(self) -> schemas.Capabilities:
        """What the service can do, and the token's role."""
        return self._get("capabilities", schemas.Capabilities)

    # Volumes and datasets

    def upload(
        self,
        path: Path,
        *,
        kind: Literal["image", "labels"] = "image",
        subject: str | None = None,
        series_uid: str | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> schemas.Volume:
        """Send a scan to the service.

        A file of more than `PIECES_FROM_BYTES` goes in pieces: when the connection breaks, the
        service is restarted, or this program is (and calls again), one piece is sent again.

        Args:
            path: NIfTI, zip of DICOM, or a multi-frame DICOM file.
            kind: What its voxels are.
            subject: A pseudonym of the patient.
            series_uid: Which series of an archive with several.
            on_progress: Told the number of bytes that have arrived so far.
        """
        if path.stat().st_size <= PIECES_FROM_BYTES:
            return self.upload_whole(
                path, kind=kind, subject=subject, series_uid=series_uid, on_progress=on_progress
            )
        return send_in_pieces(
            self._once,
            path,
            described(kind=kind, subject=subject, series_uid=series_uid),
            on_progress=on_progress,
            patience_s=PATIENCE_S,
            complete_timeout=self._patient,
        )

    def upload_whole(
        self,
        path: Path,
        *,
        kind: Literal["image", "labels"] = "image",
        subject: str | None = None,
        series_uid: str | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> schemas.Volume:
        """Send a scan in one request; a break means that all of it is sent again."""
        answer = self._send(  # the same bytes are the same volume: safe to send again
            "volumes",
            path,
            params=described(kind=kind, subject=subject, series_uid=series_uid),
            on_progress=on_progress,
        )
        return schemas.Volume.model_validate_json(answer.content)

    def volume(self, volume_id: str) -> schemas.Volume:
        """A volume by id."""
        return self._get(f"volumes/{volume_id}", schemas.Volume)

    def volumes(self, **filters: str) -> list[schemas.Volume]:
        """Every volume, newest first; filters are `kind` and `subject`."""
        return list(self._pages("volumes", schemas.VolumePage, filters))

    def download_volume(
        self, volume_id: str, path: Path, *, format: Literal["nifti", "original"] = "nifti"
    ) -> None:
        """Save a volume's file."""
        self._download(f"volumes/{volume_id}/file?format={format}", path)

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume that nothing refers to."""
        self._once("DELETE", f"volumes/{volume_id}")

    def create_dataset(
        self, name: str, items: Sequence[Item], *, split: schemas.SplitCreate | None = None
    ) -> schemas.Dataset:
        """Make a dataset of volumes with labels."""
        body = {
            "name": name,
            "items": [
                dict(zip(("volume_id", "labels_id", "split"), item, strict=False)) for item in items
            ],
            "split": split.model_dump(mode="json") if split is not None else None,
        }
        return self._create("datasets", body, schemas.Dataset)

    def dataset(self, dataset_id: str) -> schemas.Dataset:
        """A dataset by id."""
        return self._get(f"datasets/{dataset_id}", schemas.Dataset)

    def datasets(self) -> list[schemas.DatasetSummary]:
        """Every dataset, newest first, without items."""
        return list(self._pages("datasets", schemas.DatasetPage, {}))

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete a dataset that no run refers to."""
        self._once("DELETE", f"datasets/{dataset_id}")

    # Runs

    def pretrain(
        self, dataset_id: str, recipe: Mapping[str, Any] | BaseModel, *, model_name: str
    ) -> schemas.Run:
        """Start a pretraining."""
        body = {"dataset_id": dataset_id, "recipe": _plain(recipe), "model_name": model_name}
        return self._create("runs", {"kind": "pretrain", **body}, schemas.Run)

    def finetune(
        self,
        dataset_id: str,
        recipe: Mapping[str, Any] | BaseModel,
        *,
        model_name: str,
        parent: str | None = None,
    ) -> schemas.Run:
        """Start a fine-tuning, from a parent (a model, or the run of one) or from nothing."""
        body = {
            "kind": "finetune",
            "dataset_id": dataset_id,
            "recipe": _plain(recipe),
            "model_name": model_name,
            "parent": parent,
        }
        return self._create("runs", body, schemas.Run)

    def run(self, run_id: str) -> schemas.Run:
        """A run of any kind."""
        return self._get(f"runs/{run_id}", schemas.Run)

    def runs(self, *, limit: int = 50, **filters: str) -> list[schemas.Run]:
        """The newest runs; filters are `kind`, `state` and `dataset_id`."""
        page_size = str(min(limit, 500))
        pages = self._pages("runs", schemas.RunPage, {"page_size": page_size, **filters})
        return [run for run, _ in zip(pages, range(limit), strict=False)]

    def metrics(self, run_id: str) -> schemas.RunMetrics:
        """The curves of a run."""
        return self._get(f"runs/{run_id}/metrics", schemas.RunMetrics)

    def cancel(self, run_id: str) -> schemas.Run:
        """Ask a run of any kind to end."""
        collection = {"seg": "segmentations", "emb": "embeddings"}.get(run_id[:3], "runs")
        self._once("POST", f"{collection}/{run_id}:cancel")
        return self.run(run_id)

    def wait(
        self, run_id: str, on_event: OnEvent | None = None, *, timeout_s: float | None = None
    ) -> schemas.Run:
        """Follow a run to its end, through breaks of the connection.

        Events come by stream; where none gets through (some proxies hold them back), by asking.

        Args:
            run_id: A run of any kind.
            on_event: Told every event once, in order.
            timeout_s: How long to wait; for ever without it.

        Raises:
            ApiError: `timeout` after `timeout_s`, or what the service refused with.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        after, num_broken = 0, 0
        while True:
            before = after
            try:
                if num_broken < NUM_TRIES:
                    for event in self._stream(run_id, after, deadline):
                        after = event.id
                        _tell(on_event, event)
                else:
                    for event in self._listed(run_id, after):
                        after = event.id
                        _tell(on_event, event)
                    time.sleep(POLL_S)
                run = self.run(run_id)
            except ApiError as error:
                if error.status and error.status not in TRANSIENT:
                    raise
                num_broken = num_broken + 1 if after == before else 0
                if num_broken > 2 * NUM_TRIES:
                    raise
                if deadline is None or time.monotonic() < deadline:
                    time.sleep(min(2.0**num_broken * 0.1, 5.0))
            else:
                if num_broken < NUM_TRIES:  # a stream that ends early and empty is a broken one
                    num_broken = num_broken + 1 if after == before else 0
                if run.state in TERMINAL:
                    for event in self._listed(run_id, after):
                        _tell(on_event, event)
                    return run
            if deadline is not None and time.monotonic() > deadline:
                raise ApiError(0, "timeout", f"the run has not ended within {timeout_s:.0f} s")

    # Models

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

    # Inference

    def segment(
        self,
        volume_id: str,
        model: str,
        *,
        formats: Sequence[DicomFormat] | None = None,
        flips: bool | Sequence[schemas.Axis] = False,
        uncertainty: bool = False,
        wait: bool = True,
        on_event: OnEvent | None = None,
    ) -> schemas.Segmentation:
        """Segment a volume, and wait for the end unless told otherwise.

        Args:
            volume_id: The scan.
            model: `models:/name@alias`, `name/version` or `name`.
            formats: Made of a DICOM scan beside the NIfTI mask; the service's choice if absent.
            flips: Axes of mirror images over which probabilities are averaged; True is all.
            uncertainty: Also make a map of the entropy (`download_uncertainty`).
            wait: Return when it has ended.
            on_event: Told every event.
        """
        body: dict[str, Any] = {"volume_id": volume_id, "model": model}
        if formats is not None:
            body["formats"] = list(formats)
        if flips is not False:
            body["flips"] = flips if isinstance(flips, bool) else list(flips)
        if uncertainty:
            body["uncertainty"] = True
        made = self._create("segmentations", body, schemas.Segmentation)
        if not wait:
            return made
        self.wait(made.id, on_event)
        return self.segmentation(made.id)

    def segmentation(self, segmentation_id: str) -> schemas.Segmentation:
        """A segmentation by id."""
        return self._get(f"segmentations/{segmentation_id}", schemas.Segmentation)

    def download_mask(
        self, segmentation_id: str, path: Path, *, format: MaskFormat = "nifti"
    ) -> None:
        """Save the mask (.nii.gz on the grid of the scan as sent), or a DICOM object of it."""
        self._download(f"segmentations/{segmentation_id}/mask?format={format}", path)

    def download_uncertainty(self, segmentation_id: str, path: Path) -> None:
        """Save the map of the entropy (.nii.gz, 255 is 1), if it was asked for."""
        self._download(f"segmentations/{segmentation_id}/uncertainty", path)

    def download_preview(self, segmentation_id: str, path: Path) -> None:
        """Save the preview picture (PNG)."""
        self._download(f"segmentations/{segmentation_id}/preview", path)

    def embed(
        self,
        volume_id: str,
        model: str,
        *,
        wait: bool = True,
        on_event: OnEvent | None = None,
    ) -> schemas.Embedding:
        """Embed a volume, and wait for the end unless told otherwise."""
        body = {"volume_id": volume_id, "model": model}
        made = self._create("embeddings", body, schemas.Embedding)
        if not wait:
            return made
        self.wait(made.id, on_event)
        return self.embedding(made.id)

    def embedding(self, embedding_id: str) -> schemas.Embedding:
        """An embedding by id."""
        return self._get(f"embeddings/{embedding_id}", schemas.Embedding)

    def similar(
        self,
        volume_id: str,
        model: str,
        *,
        limit: int = 10,
        modality: str | None = None,
        exclude_same_subject: bool = True,
    ) -> schemas.SimilarCases:
        """The volumes whose embeddings by a model are most like that of a volume.

        Args:
            volume_id: An image volume that this model has embedded.
            model: The encoder.
            limit: The most that are given, 1 to 100.
            modality: Only of this one, such as `CT`.
            exclude_same_subject: Leave out the volume's own subject, and so the volume.
        """
        filters = {"modality": modality, "exclude_same_subject": exclude_same_subject}
        body = {"volume_id": volume_id, "model": model, "limit": limit, "filters": filters}
        answer = self._again("POST", "/embeddings:search", json=body)  # else a scheme
        return schemas.SimilarCases.model_validate_json(answer.content)

    # Batches

    def create_batch(
        self,
        dataset_id: str,
        model: str,
        kind: Literal["segment", "embed"],
        *,
        formats: Sequence[DicomFormat] = (),
        split: schemas.Split | None = None,
    ) -> schemas.Batch:
        """Run a model on every scan of a dataset, or of one of its splits."""
        options = {"formats": list(formats), "split": split}
        body = {"dataset_id": dataset_id, "model": model, "kind": kind, "options": options}
        return self._create("batches", body, schemas.Batch)

    def batch(self, batch_id: str) -> schemas.Batch:
        """How far a batch is."""
        return self._get(f"batches/{batch_id}", schemas.Batch)

    def batches(self) -> list[schemas.Batch]:
        """Every batch, newest first."""
        return list(self._pages("batches", schemas.BatchPage, {}))

    def batch_items(self, batch_id: str, **filters: str) -> list[schemas.BatchItem]:
        """Every scan of a batch; the filter is `state`."""
        return list(self._pages(f"batches/{batch_id}/items", schemas.BatchItems, filters))

    def wait_batch(
        self, batch_id: str, on_change: Callable[[schemas.Batch], None] | None = None
    ) -> schemas.Batch:
        """Follow a batch to its end."""
        while True:
            batch = self.batch(batch_id)
            if on_change is not None:
                on_change(batch)
            if batch.finished_at is not None:
                return batch
            time.sleep(POLL_S)

    def cancel_batch(self, batch_id: str) -> schemas.Batch:
        """Ask every scan of a batch that has not ended to end."""
        answer = self._once("POST", f"batches/{batch_id}:cancel")
        return schemas.Batch.model_validate_json(answer.content)

    def retry_batch(self, batch_id: str) -> schemas.Batch:
        """Do the failed and canceled scans of a batch again."""
        return self._create(f"batches/{batch_id}:retry", {}, schemas.Batch)

    def batch_table(self, batch_id: str) -> schemas.BatchTable:
        """What came of every scan of a batch that has ended."""
        return self._get(f"batches/{batch_id}/table", schemas.BatchTable)

    def download_batch_table(self, batch_id: str, path: Path) -> None:
        """Save the table as CSV."""
        self._download(f"batches/{batch_id}/table?format=csv", path)

    # How it is said

    def _get(self, path: str, shape: type[Shown], params: Mapping[str, str] | None = None) -> Shown:
        return shape.model_validate_json(self._again("GET", path, params=params).content)

    def _pages(
        self, path: str, shape: type[schemas.Page[Any]], filters: Mapping[str, str]
    ) -> Iterator[Any]:
        params = dict(filters)
        while True:
            page = self._get(path, shape, params)
            yield from page.items
            if page.next_page_token is None:
                return
            params["page_token"] = page.next_page_token

    def _create(self, path: str, body: Mapping[str, Any], shape: type[Shown]) -> Shown:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        answer = self._again("POST", path, json=body, headers=headers)
        return shape.model_validate_json(answer.content)

    def _again(self, method: str, path: str, **how: Any) -> httpx.Response:
        """Send what may be sent twice; try again when nothing, or nobody, answers."""
        for number in range(NUM_TRIES):
            try:
                return self._once(method, path, **how)
            except ApiError as error:
                if not error.is_transient or number == NUM_TRIES - 1:
                    raise
                time.sleep(0.25 * 2**number)
        raise AssertionError("unreachable: the last try returns or raises")

    def _send(
        self,
        route: str,
        path: Path,
        *,
        params: Mapping[str, str],
        on_progress: Callable[[int], None] | None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a file that may be sent twice as the body; again from its start after a break."""
        described_as = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(path.stat().st_size),
        }
        for number in range(NUM_TRIES):
            try:
                return self._once(
                    "POST",
                    route,
                    params=params,
                    content=_chunks(path, on_progress),
                    headers={**described_as, **(headers or {})},
                    timeout=self._patient,
                )
            except ApiError as error:
                if not error.is_transient or number == NUM_TRIES - 1:
                    raise
                time.sleep(0.25 * 2**number)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, method: str, path: str, **how: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **how)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        check(answer)
        return answer

    def _download(self, path: str, target: Path) -> None:
        """Save an answer; a file that broke off never gets its final name."""
        draft = target.with_name(f".{target.name}.part")
        try:
            with self._http.stream("GET", path) as answer:
                if answer.is_error:
                    answer.read()
                check(answer)
                with draft.open("wb") as file:
                    for chunk in answer.iter_bytes(CHUNK_BYTES):
                        file.write(chunk)
            draft.replace(target)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        finally:
            draft.unlink(missing_ok=True)

    def _stream(self, run_id: str, after: int, deadline: float | None) -> Iterator[schemas.Event]:
        """Events after `after` by server-sent events, until the run ends or the time is up."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        left_s = STREAM_TIMEOUT_S if deadline is None else deadline - time.monotonic()
        read_s = min(max(left_s, 0.1), STREAM_TIMEOUT_S)
        timeout = httpx.Timeout(self._timeout_s, read=read_s)
        try:
            with self._http.stream(
                "GET", f"runs/{run_id}/events", headers=headers, timeout=timeout
            ) as answer:
                if answer.is_error:
                    answer.read()
                check(answer)
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "data":
                        yield schemas.Event.model_validate_json(value)
                    if deadline is not None and time.monotonic() > deadline:
                        return
        except httpx.TransportError as error:
            raise unreachable(error) from error

    def _listed(self, run_id: str, after: int) -> Iterator[schemas.Event]:
        """Events after `after` by asking, as many as there are now."""
        while True:
            path, params = f"runs/{run_id}/events", {"after": str(after)}
            headers = {"Accept": "application/json"}
            answer = self._again("GET", path, params=params, headers=headers)
            found = schemas.Events.model_validate_json(answer.content).events
            if not found:
                return
            yield from found
            after = found[-1].id


def _tell(on_event: OnEvent | None, event: schemas.Event) -> None:
    if on_event is not None:
        on_event(event)


def _chunks(path: Path, on_progress: Callable[[int], None] | None) -> Iterator[bytes]:
    sent = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            sent += len(chunk)
            if on_progress is not None:
                on_progress(sent)


def _plain(recipe: Mapping[str, Any] | BaseModel) -> dict[str, Any]:
    return recipe.model_dump(mode="json") if isinstance(recipe, BaseModel) else dict(recipe)
