"""A project's embeddings of a region by a bundle, in memory, for an exact search without reading.

A search asks the database for the space's revision, which triggers raise with every embedding that
is written, replaced or removed, and reads the changed rows alone. Then float32
finds the candidates, with a margin above its own error, and float64 decides among them, from the
rows as they are in the database at that moment: what was removed is never found, by whichever
process it was removed.

Shapes: (N, E) N vectors of E numbers; C candidates.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, Row, Select, func, select
from sqlalchemy.orm import Session

from service import embeddings
from service.db import Embedding, EmbeddingChange, EmbeddingSpace, Volume, project_of
from service.embeddings import STORED, WHOLE, Filters, Found, Vector

READ_AT_ONCE = 500
"""Rows; below the number of parameters that SQLite takes."""
ROW_BYTES = 500
"""Of a volume's id and facts beside its vector, about; measured with `sys.getsizeof`."""

_Facts = tuple[str, str, str]


class Space:
    """A bundle's vectors of a region, each of unit length; one thread at a time (`lock`)."""

    def __init__(self, digest: str, region: str, dims: int) -> None:
        self.lock = threading.Lock()
        self.digest = digest
        self.region = region
        self.dims = dims
        self.revision = -1
        self.ids: list[str] = []
        self._place: dict[str, int] = {}
        self._units = np.zeros((0, dims), np.float32)
        self._facts: list[npt.NDArray[np.object_]] = [np.empty(0, object) for _ in range(3)]

    @property
    def num_bytes(self) -> int:
        """Of memory, about."""
        return self._units.nbytes + ROW_BYTES * len(self._units)

    def follow(self, session: Session) -> None:
        """Take in what has changed since the last time. Commits."""
        found = session.scalar(
            select(EmbeddingSpace.revision).where(
                EmbeddingSpace.bundle_digest == self.digest, EmbeddingSpace.region == self.region
            )
        )
        session.commit()
        revision = found or 0
        if revision == self.revision:
            return
        changed = None if self.revision < 0 else self._changed_ids(session)
        if changed is None or len(changed) > max(READ_AT_ONCE, len(self.ids) // 10):
            self._read_all(session)
        else:
            for some in _chunks(changed):
                rows = session.execute(
                    _rows(self.digest, self.region).where(Embedding.volume_id.in_(some))
                )
                present = {row.volume_id: row for row in rows}
                session.commit()
                for volume_id in some:
                    self._put(volume_id, present.get(volume_id))
        self.revision = revision

    def candidates(self, unit: Vector, limit: int, filters: Filters) -> tuple[list[str], int]:
        """Ids among which the `limit` largest cosines surely are, and how many were compared."""
        count = len(self.ids)
        cosines = self._units[:count] @ unit.astype(np.float32)  # (N,)
        wanted = self._wanted(filters)
        places = np.arange(count) if wanted is None else np.flatnonzero(wanted)
        cosines = cosines[places]
        if places.size > limit:
            last = np.partition(cosines, -limit)[-limit]
            # Of two sums of E products of unit vectors, each off by at most (E + 4) roundings.
            margin = 2.0 * (self.dims + 4) * float(np.finfo(np.float32).eps)
            keep = cosines >= last - margin - 10.0**-embeddings.DECIMALS
            return [self.ids[place] for place in places[keep]], int(places.size)
        return [self.ids[place] for place in places], int(places.size)

    def _wanted(self, filters: Filters) -> npt.NDArray[np.bool_] | None:
        subject, modality, kind = (column[: len(self.ids)] for column in self._facts)
        conditions = [
            column == value
            for column, value in ((modality, filters.modality), (kind, filters.kind))
            if value is not None
        ]
        if filters.not_subject is not None:
            conditions.append(subject != filters.not_subject)
        return np.logical_and.reduce(conditions) if conditions else None

    def _changed_ids(self, session: Session) -> list[str] | None:
        """Volumes whose vector is another one now; None if the record does not reach back."""
        rows = session.execute(
            select(EmbeddingChange.revision, EmbeddingChange.volume_id)
            .where(
                EmbeddingChange.bundle_digest == self.digest,
                EmbeddingChange.region == self.region,
                EmbeddingChange.revision > self.revision,
            )
            .order_by(EmbeddingChange.revision)
        ).all()
        session.commit()
        if not rows or rows[0].revision != self.revision + 1:
            return None
        return sorted({row.volume_id for row in rows})

    def _read_all(self, session: Session) -> None:
        count = _count(session, self.digest, self.region)
        self.ids, self._place = [], {}
        self._units = np.zeros((count, self.dims), np.float32)
        self._facts = [np.empty(count, object) for _ in range(3)]
        after = ""
        wanted = _rows(self.digest, self.region).order_by(Embedding.volume_id).limit(READ_AT_ONCE)
        while rows := session.execute(wanted.where(Embedding.volume_id > after)).all():
            session.commit()
            for row in rows:
                self._put(row.volume_id, row)
            after = rows[-1].volume_id
        session.commit()

    def _put(self, volume_id: str, row: Row[str, int, bytes, str, str, str] | None) -> None:
        """Write, replace or (None) remove a volume's vector."""
        place = self._place.get(volume_id)
        if row is None or row.dims != self.dims:
            if place is not None:
                self._remove(place)
            return
        if place is None:
            place = len(self.ids)
            self._reserve(place + 1)
            self.ids.append(volume_id)
            self._place[volume_id] = place
        vector = np.frombuffer(row.vector, STORED).astype(np.float64)
        self._units[place] = vector / (np.linalg.norm(vector) or 1.0)
        facts: _Facts = (row.subject, row.modality, row.kind)
        for column, fact in zip(self._facts, facts, strict=True):
            column[place] = fact

    def _remove(self, place: int) -> None:
        """The last one takes its place."""
        last = len(self.ids) - 1
        del self._place[self.ids[place]]
        if place != last:
            self.ids[place] = self.ids[last]
            self._place[self.ids[place]] = place
            self._units[place] = self._units[last]
            for column in self._facts:
                column[place] = column[last]
        self.ids.pop()

    def _reserve(self, count: int) -> None:
        if count <= len(self._units):
            return
        more = max(64, len(self._units) // 8)
        self._units = np.concatenate([self._units, np.zeros((more, self.dims), np.float32)])
        self._facts = [np.concatenate([column, np.empty(more, object)]) for column in self._facts]


Key = tuple[str, str, str]
"""Project, digest of the bundle, region."""


class Spaces:
    """The spaces searched last, by project, up to a number of bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spaces: OrderedDict[Key, Space] = OrderedDict()

    def get(self, key: Key, dims: int) -> Space:
        """The space of a project, bundle and region, which may be empty yet."""
        with self._lock:
            space = self._spaces.pop(key, None)
            if space is None or space.dims != dims:
                _, digest, region = key
                space = Space(digest, region, dims)
            self._spaces[key] = space
            return space

    def num_known(self, key: Key) -> int:
        """How many vectors of a space were in memory at its last search."""
        with self._lock:
            space = self._spaces.get(key)
            return 0 if space is None else len(space.ids)

    def shrink(self, max_bytes: int) -> None:
        """Forget those searched longest ago until the rest fits."""
        with self._lock:
            while self._spaces and sum(s.num_bytes for s in self._spaces.values()) > max_bytes:
                self._spaces.popitem(last=False)


_OF_ENGINE: WeakKeyDictionary[Engine, Spaces] = WeakKeyDictionary()
_LOCK = threading.Lock()


def search(
    session: Session,
    query: Vector,
    bundle_digest: str,
    *,
    limit: int,
    filters: Filters,
    max_bytes: int,
    region: str = WHOLE,
) -> Found:
    """What `embeddings.search` gives, from memory where the bundle's vectors fit. Commits.

    Args:
        session: Database session of a project: its scans alone are found.
        query: (E,), finite; all zero, it is like nothing.
        bundle_digest: Of the encoder.
        limit: The most that are given.
        filters: Which volumes are looked at.
        max_bytes: Of all bundles in memory together; one that alone is larger is read block by
            block from the database.
        region: What of the volumes is compared.

    Raises:
        ServiceError: 422 `invalid_request` if the bundle's vectors are not of E numbers.
    """
    dims = embeddings.dims_of(session, bundle_digest, query)
    spaces = _spaces_of(session)
    key = (project_of(session), bundle_digest, region)
    count = spaces.num_known(key) or _count(session, bundle_digest, region)
    if not count or dims is None or count * (dims * STORED.itemsize + ROW_BYTES) > max_bytes:
        return embeddings.search(
            session, query, bundle_digest, limit=limit, filters=filters, region=region
        )
    unit = embeddings.unit_of(query)
    space = spaces.get(key, dims)
    with space.lock:
        space.follow(session)
        ids, num_compared = space.candidates(unit, limit, filters)
    spaces.shrink(max_bytes)
    ranked = sorted(_exact(session, bundle_digest, region, ids, unit))[:limit]
    found = embeddings.described(
        session,
        bundle_digest,
        region,
        [one for _, one in ranked],
        np.array([-minus for minus, _ in ranked]),
    )
    return Found(found, num_compared)


def _exact(
    session: Session, digest: str, region: str, ids: Sequence[str], unit: Vector
) -> Iterator[tuple[float, str]]:
    """Minus the cosine in float64, and the id, of those that are still there with that size."""
    for some in _chunks(ids):
        rows = session.execute(
            select(Embedding.volume_id, Embedding.vector).where(
                Embedding.bundle_digest == digest,
                Embedding.region == region,
                Embedding.volume_id.in_(some),
                Embedding.dims == unit.size,
            )
        ).all()
        session.commit()
        if not rows:
            continue
        data = b"".join(row.vector for row in rows)
        vectors = np.frombuffer(data, STORED).reshape(len(rows), -1).astype(np.float64)
        for row, cosine in zip(rows, embeddings.cosines(vectors, unit), strict=True):
            yield -float(cosine), row.volume_id


def _count(session: Session, digest: str, region: str) -> int:
    counted = select(func.count()).select_from(Embedding)
    count = session.scalar(
        counted.where(Embedding.bundle_digest == digest, Embedding.region == region)
    )
    session.commit()
    return count or 0


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), READ_AT_ONCE):
        yield ids[start : start + READ_AT_ONCE]


def _rows(digest: str, region: str) -> Select[str, int, bytes, str, str, str]:
    return (
        select(
            Embedding.volume_id,
            Embedding.dims,
            Embedding.vector,
            Volume.subject,
            Volume.modality,
            Volume.kind,
        )
        .join(Volume, Volume.id == Embedding.volume_id)
        .where(Embedding.bundle_digest == digest, Embedding.region == region)
    )


def _spaces_of(session: Session) -> Spaces:
    bind = session.get_bind()
    engine = bind if isinstance(bind, Engine) else bind.engine
    with _LOCK:
        return _OF_ENGINE.setdefault(engine, Spaces())
