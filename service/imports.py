"""Models from elsewhere: the file that was sent is kept, and a run is queued to open it."""

from __future__ import annotations

from sqlalchemy.orm import Session

from service import runs, volumes
from service.db import Artifact, Run
from service.storage import Store

SENT = "sent"
"""Name of the artifact that holds the file as it was sent."""


def create(
    session: Session, store: Store, *, name: str, sha256: str, size: int, principal: str
) -> Run:
    """Queue the import of a file that lies in the store; the caller commits and rings.

    Raises:
        ServiceError: 503 `not_live` if the file was discarded meanwhile.
    """
    volumes.record_blob(session, store, sha256, size)
    run = runs.create(
        session,
        kind="import",
        spec={"model_name": name, "sha256": sha256, "size_bytes": size},
        principal=principal,
    )
    session.add(
        Artifact(
            run_id=run.id, name=SENT, sha256=sha256, media_type="application/octet-stream", fence=0
        )
    )
    session.flush()
    return run
