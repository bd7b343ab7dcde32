"""Stored embeddings, and the scans whose embeddings are most like a given one.

One vector for each volume, region of it and bundle (the newest run's); the region without a name is
the whole volume. Vectors of different bundles lie in different spaces, and livers are not compared
with lungs: a search reads those of one bundle digest and one region and no others. It is exact:
every vector is compared, block by block, so memory does not grow with their number.

Shapes: (N, E) N vectors of E numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import Select, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.db import Embedding, Run, Volume, db_now
from service.errors import ServiceError

STORED = np.dtype("<f4")
BLOCK_BYTES = 4 << 20
"""Of the vectors that are in memory at a time, as stored; compared, they are twice as large."""
WHOLE = ""
"""The region that is the whole volume."""
DECIMALS = 12
"""Of a cosine: float64 sums differ beyond them by the order of adding, and ties must be ties."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class NewEmbedding:
    """What a run found of a volume or of its region, recorded when the run succeeds."""

    model_name: str
    model_version: int
    bundle_digest: str
    vector: npt.NDArray[np.float32] | None
    """(E,); None: the run found no such region, and what an older one found is removed."""
    region: str = WHOLE


@dataclass(frozen=True, slots=True)
class Filters:
    """Which volumes are looked at; None: no condition."""

    modality: str | None = None
    kind: str | None = None
    not_subject: str | None = None


@dataclass(frozen=True, slots=True)
class Similar:
    """A volume that was found."""

    volume_id: str
    run_id: str
    subject: str
    modality: str
    cosine: float


@dataclass(frozen=True, slots=True)
class Found:
    """The most alike first, ties by volume id; and how many were compared."""

    items: tuple[Similar, ...]
    num_compared: int


def record(session: Session, run_id: str, volume_id: str, new: NewEmbedding) -> None:
    """Store what a run found instead of an older vector of its space; the caller commits.

    Raises:
        ValueError: It is not one vector of finite numbers.
    """
    if new.vector is None:
        session.execute(
            delete(Embedding)
            .where(
                Embedding.bundle_digest == new.bundle_digest,
                Embedding.region == new.region,
                Embedding.volume_id == volume_id,
            )
            .execution_options(synchronize_session=False)
        )
        return
    vector = np.ascontiguousarray(new.vector, dtype=STORED)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        raise ValueError(f"an embedding is one vector of finite numbers, not {vector.shape}")
    values = {
        "model_name": new.model_name,
        "model_version": new.model_version,
        "run_id": run_id,
        "dims": vector.size,
        "vector": vector.tobytes(),
        "created_at": db_now(),
    }
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    insert = postgresql.insert if is_postgresql else sqlite.insert
    statement = insert(Embedding).values(
        bundle_digest=new.bundle_digest, region=new.region, volume_id=volume_id, **values
    )
    key = ["bundle_digest", "region", "volume_id"]
    session.execute(statement.on_conflict_do_update(index_elements=key, set_=values))


def of_volume(
    session: Session, volume_id: str, bundle_digest: str, model: str, region: str = WHOLE
) -> Vector:
    """The stored vector of a volume or of its region, (E,).

    Raises:
        ServiceError: 409 `not_embedded`.
    """
    data = session.execute(
        select(Embedding.vector).where(
            Embedding.bundle_digest == bundle_digest,
            Embedding.region == region,
            Embedding.volume_id == volume_id,
        )
    ).scalar_one_or_none()
    if data is None:
        of_region = f"region {region!r} of " if region else ""
        how = ", and segmentation_id or segmenter" if region else ""
        raise ServiceError(
            409,
            "not_embedded",
            f"{of_region}volume {volume_id} has no embedding of {model}; embed it first: "
            f"POST /api/v1/embeddings with this volume_id and model{how}, then search again",
            extra={"volume_id": volume_id, "model": model, "region": region},
        )
    return np.frombuffer(data, STORED).astype(np.float64)


def of_run(run: Run, region: str = WHOLE) -> Vector:
    """The vector that an embedding run gave for the volume or for a region of it, (E,).

    Raises:
        ServiceError: 409 `not_ready`; 409 `not_embedded`, it gave none for this region.
    """
    if run.state != "succeeded" or run.result is None:
        raise ServiceError(
            409,
            "not_ready",
            f"there is a vector once the state is succeeded; it is {run.state}",
            extra={"state": run.state},
        )
    found = run.result["vector"]
    if region != WHOLE:
        vectors = {one["region"]: one["vector"] for one in run.result.get("regions", ())}
        found = vectors.get(region)
    if found is None:
        raise ServiceError(
            409,
            "not_embedded",
            f"embedding {run.id} has no vector of a region {region!r}",
            extra={"embedding_id": run.id, "region": region},
        )
    return np.asarray(found, STORED).astype(np.float64)


def search(
    session: Session,
    query: Vector,
    bundle_digest: str,
    *,
    limit: int,
    filters: Filters,
    region: str = WHOLE,
) -> Found:
    """The stored vectors of a bundle and a region with the largest cosine to a query.

    A transaction is held for one block at a time: on SQLite it keeps writers out (`db.connect`).
    A vector that is written or removed meanwhile may be seen or not. Commits.

    Args:
        session: Database session.
        query: (E,), finite; all zero, it is like nothing.
        bundle_digest: Of the encoder.
        limit: The most that are given.
        filters: Which volumes are looked at.
        region: What of them is compared.

    Raises:
        ServiceError: 422 `invalid_request` if the bundle's vectors are not of E numbers.
    """
    dims_of(session, bundle_digest, query)
    unit = unit_of(query)
    best_ids: list[str] = []
    best: Vector = np.empty(0)
    num_compared = 0
    for ids, vectors in _blocks(session, bundle_digest, region, query.size, filters):
        compared = cosines(vectors, unit)
        kept = _top(compared, limit)
        best = np.concatenate([best, compared[kept]])
        best_ids += [ids[index] for index in kept]
        order = np.argsort(-best, kind="stable")[:limit]  # a tie keeps the order of the ids
        best, best_ids = best[order], [best_ids[index] for index in order]
        num_compared += len(ids)
    return Found(described(session, bundle_digest, region, best_ids, best), num_compared)


def dims_of(session: Session, bundle_digest: str, query: Vector) -> int | None:
    """E of a bundle's vectors, None where there are none. Commits.

    Raises:
        ServiceError: 422 `invalid_request` if the query's size is another one.
    """
    stored = select(Embedding.dims).where(Embedding.bundle_digest == bundle_digest).limit(1)
    dims = session.scalar(stored)
    session.commit()
    if dims is not None and dims != query.size:
        raise _wrong_size(query.size, dims)
    return dims


def unit_of(query: Vector) -> Vector:
    """A query (E,) at length 1, or zeros."""
    scaled = query / (np.abs(query).max() or 1.0)  # a caller's numbers could overflow when squared
    unit: Vector = scaled / (np.linalg.norm(scaled) or 1.0)
    return unit


def _top(cosines: Vector, limit: int) -> npt.NDArray[np.intp]:
    """Where the `limit` largest are, in order of place, with all that tie with the last: (K,)."""
    if cosines.size <= limit:
        return np.arange(cosines.size)
    last = np.argpartition(cosines, -limit)[-limit]
    return np.flatnonzero(cosines >= cosines[last])


def cosines(vectors: Vector, unit: Vector) -> Vector:
    """Of each row of (N, E) and a vector (E,) of length 1: (N,); 0 for a row of zeros.

    Squares of float32 numbers neither over- nor underflow in float64.
    """
    lengths = np.sqrt(np.einsum("ne,ne->n", vectors, vectors))
    found = (vectors @ unit) / np.where(lengths > 0.0, lengths, 1.0)
    return np.clip(np.round(found, DECIMALS), -1.0, 1.0)


def _blocks(
    session: Session, bundle_digest: str, region: str, dims: int, filters: Filters
) -> Iterator[tuple[list[str], Vector]]:
    """Volume ids and their vectors (N, E) in order of the ids, each block in its transaction."""
    size = max(1, BLOCK_BYTES // (dims * STORED.itemsize))
    wanted = (
        select(Embedding.volume_id, Embedding.vector)
        .join(Volume, Volume.id == Embedding.volume_id)
        .where(
            Embedding.bundle_digest == bundle_digest,
            Embedding.region == region,
            Embedding.dims == dims,
        )
        .order_by(Embedding.volume_id)
        .limit(size)
    )
    wanted = _filtered(wanted, filters)
    after = ""
    while True:
        rows = session.execute(wanted.where(Embedding.volume_id > after)).all()
        session.commit()
        if not rows:
            return
        data = b"".join(row.vector for row in rows)
        yield (
            [row.volume_id for row in rows],
            np.frombuffer(data, STORED).reshape(len(rows), dims).astype(np.float64),
        )
        after = rows[-1].volume_id


def _filtered(wanted: Select[str, bytes], filters: Filters) -> Select[str, bytes]:
    if filters.modality is not None:
        wanted = wanted.where(Volume.modality == filters.modality)
    if filters.kind is not None:
        wanted = wanted.where(Volume.kind == filters.kind)
    if filters.not_subject is not None:
        wanted = wanted.where(Volume.subject != filters.not_subject)
    return wanted


def described(
    session: Session, bundle_digest: str, region: str, ids: Sequence[str], cosines: Vector
) -> tuple[Similar, ...]:
    """What was found, with its volume's facts; without what was removed meanwhile. Commits."""
    rows = session.execute(
        select(Embedding.volume_id, Embedding.run_id, Volume.subject, Volume.modality)
        .join(Volume, Volume.id == Embedding.volume_id)
        .where(
            Embedding.bundle_digest == bundle_digest,
            Embedding.region == region,
            Embedding.volume_id.in_(ids),
        )
    ).all()
    session.commit()
    facts = {row.volume_id: row for row in rows}
    return tuple(
        Similar(one, facts[one].run_id, facts[one].subject, facts[one].modality, float(cosine))
        for one, cosine in zip(ids, cosines, strict=True)
        if one in facts  # not deleted meanwhile
    )


def _wrong_size(found: int, expected: int) -> ServiceError:
    message = f"{found} numbers, but this model's embeddings have {expected}"
    return ServiceError(
        422,
        "invalid_request",
        f"the vector has {message}",
        extra={"errors": [{"pointer": "/body/vector", "message": message}]},
    )
