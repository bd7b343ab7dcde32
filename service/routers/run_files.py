"""Files that a training left: pictures of what it reconstructs, its score on each test case."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response

from service import db, runs, schemas
from service.routers import deps, docs, files

PICTURE = "image/png"
TRAININGS = (db.RunKind.PRETRAIN, db.RunKind.FINETUNE)
FileName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9.-]{0,59}$", examples=["preview-500.png"])]

router = deps.router("runs")


@router.get(
    "/runs/{run_id}/files",
    operation_id="list_run_files",
    summary="List the files of a training",
    responses=docs.problems("invalid_request", "not_found"),
)
def list_run_files(
    run_id: schemas.RunId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.RunFiles:
    """What a training that has succeeded left beside its model, by name; none before."""
    runs.get(session, run_id, kinds=TRAININGS)
    return schemas.RunFiles(
        files=tuple(
            schemas.RunFile(name=one.name, media_type=one.media_type, sha256=one.sha256)
            for one in runs.artifacts(session, run_id)
        )
    )


@router.get(
    "/runs/{run_id}/files/{file_name}",
    operation_id="download_run_file",
    summary="Download a file of a training",
    response_class=Response,
    responses=docs.file("The file", PICTURE, files.BYTES)
    | docs.problems("invalid_request", "not_found", "blob_corrupt"),
)
def download_run_file(
    run_id: schemas.RunId,
    file_name: FileName,
    _caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
) -> Response:
    """The file, its bytes checked against their digest."""
    runs.get(session, run_id, kinds=TRAININGS)
    found = runs.artifact(session, run_id, file_name)
    sha256, media_type = found.sha256, PICTURE if found.media_type == PICTURE else files.BYTES
    session.rollback()  # nothing is locked while the file is hashed
    return files.attachment(store, sha256, file_name, media_type)
