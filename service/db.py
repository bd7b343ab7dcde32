"""The tables. The database is the truth: a run's row is its queue entry, its lease and its record.

Times are UTC and, where they decide anything (leases, publication), the database's own clock.
Run states: queued -> starting -> running -> succeeded | failed | canceled, with `canceling` (asked
to stop) and `interrupted` (lost its worker; will resume by itself). Terminal states never change.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Connection,
    DateTime,
    Dialect,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
    literal,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class RunState(StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    CANCELING = "canceling"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELED})
CLAIMABLE = frozenset({RunState.QUEUED, RunState.INTERRUPTED})
HELD = frozenset({RunState.STARTING, RunState.RUNNING, RunState.CANCELING})


class RunKind(StrEnum):
    """What a run does."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"
    SEGMENT = "segment"
    EMBED = "embed"
    CHECK = "check"
    IMPORT = "import"


QUEUE_OF = {
    RunKind.PRETRAIN: "train",
    RunKind.FINETUNE: "train",
    RunKind.SEGMENT: "inference",
    RunKind.EMBED: "inference",
    RunKind.CHECK: "inference",
    RunKind.IMPORT: "inference",
}
ID_PREFIX_OF = {
    RunKind.PRETRAIN: "run",
    RunKind.FINETUNE: "run",
    RunKind.SEGMENT: "seg",
    RunKind.EMBED: "emb",
    RunKind.CHECK: "chk",
    RunKind.IMPORT: "imp",
}


def new_id(prefix: str) -> str:
    """An opaque id such as ``vol_1f0c...``."""
    return f"{prefix}_{uuid.uuid4().hex}"


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware UTC time on every database (SQLite keeps none)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; naive times are refused."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a naive time has no meaning here")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Always aware."""
        if value is not None and value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        return value


class db_now(FunctionElement[datetime]):  # noqa: N801  # reads as an SQL function
    """The database's clock, plus `offset_s` seconds, in UTC."""

    type = UtcDateTime()
    inherit_cache = False

    def __init__(self, offset_s: float = 0.0) -> None:
        self.offset_s = float(offset_s)
        super().__init__()


@compiles(db_now, "postgresql")
def _db_now_postgresql(element: db_now, compiler: SQLCompiler, **_: Any) -> str:
    return f"(clock_timestamp() + interval '{element.offset_s} seconds')"


@compiles(db_now, "sqlite")
def _db_now_sqlite(element: db_now, compiler: SQLCompiler, **_: Any) -> str:
    # The text form that SQLAlchemy's DateTime writes, so that comparison as text is by time.
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', '{element.offset_s:+f} seconds') || '000')"


class Base(DeclarativeBase):
    """All tables; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  # SQLAlchemy's own form
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON,
    }


class Token(Base):
    """An API token; only the SHA-256 of the secret is kept."""

    __tablename__ = "token"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    role: Mapped[str] = mapped_column(String(20))
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Blob(Base):
    """A content-addressed file in the store."""

    __tablename__ = "blob"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())


class Volume(Base):
    """One scan (a series or a NIfTI file), or one label volume."""

    __tablename__ = "volume"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))  # image | labels
    subject: Mapped[str] = mapped_column(String(64), index=True)
    modality: Mapped[str] = mapped_column(String(16))
    format: Mapped[str] = mapped_column(String(16))
    original_sha256: Mapped[str] = mapped_column(ForeignKey("blob.sha256"))
    series_selector: Mapped[str] = mapped_column(String(64), default="")
    voxels_sha256: Mapped[str] = mapped_column(ForeignKey("blob.sha256"))
    shape: Mapped[list[Any]]
    spacing_mm: Mapped[list[Any]]
    affine: Mapped[list[Any]]
    source_shape: Mapped[list[Any]]
    source_affine: Mapped[list[Any]]
    intake: Mapped[dict[str, Any]]
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    original_removed_at: Mapped[datetime | None]
    __table_args__ = (
        UniqueConstraint("original_sha256", "kind", "subject", "series_selector"),
        CheckConstraint("kind IN ('image', 'labels')", name="kind"),
        Index(None, "created_at", "id"),
    )


class Upload(Base):
    """A file that comes in pieces; complete when it became a volume, and swept when it is stale.

    `received_bytes` are checked and on the disk (fsync before commit); empty text is "not given".
    """

    __tablename__ = "upload"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    received_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    kind: Mapped[str] = mapped_column(String(10))
    subject: Mapped[str] = mapped_column(String(64), default="")
    series_selector: Mapped[str] = mapped_column(String(64), default="")
    volume_id: Mapped[str | None] = mapped_column(
        ForeignKey("volume.id", ondelete="CASCADE"), index=True
    )
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    updated_at: Mapped[datetime] = mapped_column(server_default=db_now(), index=True)
    __table_args__ = (
        UniqueConstraint("created_by", "sha256", "kind", "subject", "series_selector"),
        CheckConstraint("kind IN ('image', 'labels')", name="kind"),
        CheckConstraint("received_bytes BETWEEN 0 AND size_bytes", name="received_bytes"),
    )


class Dataset(Base):
    """An immutable list of volumes with labels and a split by subject."""

    __tablename__ = "dataset"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    digest: Mapped[str] = mapped_column(String(64))
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (Index(None, "created_at", "id"),)


class DatasetItem(Base):
    """A volume of a dataset, perhaps with labels, in one split."""

    __tablename__ = "dataset_item"
    dataset_id: Mapped[str] = mapped_column(
        ForeignKey("dataset.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volume.id"), index=True)
    labels_id: Mapped[str | None] = mapped_column(ForeignKey("volume.id"), index=True)
    subject: Mapped[str] = mapped_column(String(64))
    split: Mapped[str] = mapped_column(String(8))
    __table_args__ = (CheckConstraint("split IN ('train', 'val', 'test')", name="split"),)


class Run(Base):
    """One execution of a recipe or of an inference."""

    __tablename__ = "run"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(12))
    state: Mapped[str] = mapped_column(String(12))
    queue: Mapped[str] = mapped_column(String(12))
    priority: Mapped[int] = mapped_column(default=0)
    needs_device: Mapped[str] = mapped_column(String(8), default="", server_default="")
    needs_memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    spec: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]  # {code, detail}
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("dataset.id"), index=True)
    volume_id: Mapped[str | None] = mapped_column(ForeignKey("volume.id"), index=True)
    attempt: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(120))
    lease_until: Mapped[datetime | None]
    suspect_at: Mapped[datetime | None]
    publish_after: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        CheckConstraint(
            "state IN ('queued', 'starting', 'running', 'canceling', 'interrupted', "
            "'succeeded', 'failed', 'canceled')",
            name="state",
        ),
        Index(None, "queue", "state", "priority", "created_at"),
        Index(None, "created_at", "id"),
        Index("ix_run_share", "queue", "created_by", "started_at"),
        Index(
            "ix_run_waiting",
            "queue",
            "created_by",
            "priority",
            "created_at",
            "id",
            sqlite_where=text("state IN ('interrupted', 'queued')"),
            postgresql_where=text("state IN ('interrupted', 'queued')"),
        ),
    )


class RunAttempt(Base):
    """One claim of a run by a worker, and how it ended."""

    __tablename__ = "run_attempt"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    worker: Mapped[str] = mapped_column(String(120))
    started_at: Mapped[datetime] = mapped_column(server_default=db_now())
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(20))
    exit_code: Mapped[int | None]
    detail: Mapped[str | None] = mapped_column(Text)


class RunEvent(Base):
    """What happened in a run, in order; `seq` is the event id of the SSE stream."""

    __tablename__ = "run_event"
    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"))
    type: Mapped[str] = mapped_column(String(10))  # state | progress | metric | log
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (Index(None, "run_id", "seq"),)


class Artifact(Base):
    """A file that a run produced (mask, preview)."""

    __tablename__ = "artifact"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(60), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blob.sha256"))
    media_type: Mapped[str] = mapped_column(String(60))
    fence: Mapped[int] = mapped_column(BigInteger)


class Embedding(Base):
    """A volume's vector by one bundle, of its newest run, for `service.embeddings.search`.

    `vector` holds little-endian float32; the key is in the order in which a search reads.
    """

    __tablename__ = "embedding"
    bundle_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    volume_id: Mapped[str] = mapped_column(
        ForeignKey("volume.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    model_name: Mapped[str] = mapped_column(String(100))
    model_version: Mapped[int]
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), index=True)
    dims: Mapped[int]
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (CheckConstraint("dims > 0 AND length(vector) = 4 * dims", name="dims"),)


class EmbeddingSpace(Base):
    """How often the stored embeddings of a bundle have changed; triggers count (migration 0004)."""

    __tablename__ = "embedding_space"
    bundle_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger)


class EmbeddingChange(Base):
    """A volume whose embedding was written, replaced or removed; the last 10,000 of a bundle."""

    __tablename__ = "embedding_change"
    bundle_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    volume_id: Mapped[str] = mapped_column(String(40))


class Model(Base):
    """A registered model: a name with versions."""

    __tablename__ = "model"
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    kind: Mapped[str] = mapped_column(String(12))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())


class ModelVersion(Base):
    """One bundle under a model's name."""

    __tablename__ = "model_version"
    model_name: Mapped[str] = mapped_column(ForeignKey("model.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    manifest: Mapped[dict[str, Any]]
    run_id: Mapped[str | None] = mapped_column(ForeignKey("run.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (UniqueConstraint("run_id"),)


class ModelAlias(Base):
    """A movable name for a version (`champion`); `revision` is its ETag."""

    __tablename__ = "model_alias"
    model_name: Mapped[str] = mapped_column(ForeignKey("model.name"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(100), primary_key=True)
    version: Mapped[int]
    revision: Mapped[int] = mapped_column(default=1)
    updated_at: Mapped[datetime] = mapped_column(server_default=db_now())


class AliasEvent(Base):
    """Append-only: which version an alias pointed at, from when, set by whom."""

    __tablename__ = "alias_event"
    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    model_name: Mapped[str] = mapped_column(ForeignKey("model.name"))
    alias: Mapped[str] = mapped_column(String(100))
    version: Mapped[int | None]
    set_by: Mapped[str] = mapped_column(String(40))
    cause: Mapped[str] = mapped_column(String(10), default="set", server_default="set")
    """`set`, `rollback` or `remove`."""
    override_reason: Mapped[str | None] = mapped_column(String(500))
    unmet: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """Names of the gate's checks that the move was made against."""
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (Index(None, "model_name", "alias", "seq"),)


class GoldenCase(Base):
    """A scan whose answer is known: what every new version of a model must reproduce."""

    __tablename__ = "golden_case"
    model_name: Mapped[str] = mapped_column(ForeignKey("model.name"), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volume.id"), index=True)
    labels_id: Mapped[str | None] = mapped_column(ForeignKey("volume.id"), index=True)
    expected: Mapped[dict[str, Any]]
    """Segmenter: {labels: [{name, value, min_dice}]}; encoder: {vector: [...], min_cosine}."""
    set_by: Mapped[str] = mapped_column(String(40))
    updated_at: Mapped[datetime] = mapped_column(server_default=db_now())


class VersionCheck(Base):
    """A check run of a version against the golden cases as they were (`golden_digest`)."""

    __tablename__ = "version_check"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    model_name: Mapped[str] = mapped_column(String(100))
    version: Mapped[int]
    golden_digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (
        ForeignKeyConstraint(
            ["model_name", "version"], ["model_version.model_name", "model_version.version"]
        ),
        Index(None, "model_name", "version", "created_at"),
    )


class Batch(Base):
    """One request over a dataset; its state is that of its runs and stands nowhere else."""

    __tablename__ = "batch"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    kind: Mapped[str] = mapped_column(String(12))
    model: Mapped[dict[str, Any]]
    options: Mapped[dict[str, Any]]
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (
        CheckConstraint("kind IN ('segment', 'embed')", name="kind"),
        Index(None, "created_at", "id"),
    )


class BatchItem(Base):
    """A scan of a batch and the newest run on it."""

    __tablename__ = "batch_item"
    batch_id: Mapped[str] = mapped_column(
        ForeignKey("batch.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volume.id"), index=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), index=True)
    tries: Mapped[int] = mapped_column(default=1)


class Idempotency(Base):
    """The first answer to a creating request, replayed for its repeats for 24 hours."""

    __tablename__ = "idempotency"
    principal: Mapped[str] = mapped_column(String(40), primary_key=True)
    route: Mapped[str] = mapped_column(String(120), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[int | None]
    headers: Mapped[dict[str, Any] | None]
    body: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())


class WorkerHeartbeat(Base):
    """A live worker process and what it serves; readiness asks for one a queue."""

    __tablename__ = "worker_heartbeat"
    worker: Mapped[str] = mapped_column(String(120), primary_key=True)
    queue: Mapped[str] = mapped_column(String(12))
    device: Mapped[str] = mapped_column(String(120))
    device_kind: Mapped[str] = mapped_column(String(8), default="cpu", server_default="cpu")
    memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    used_bytes: Mapped[int | None] = mapped_column(BigInteger)
    seen_at: Mapped[datetime] = mapped_column(server_default=db_now())


class WarmRequest(Base):
    """A bundle that inference workers shall keep loaded until then (`service.warming`)."""

    __tablename__ = "warm_request"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    until: Mapped[datetime]


class WarmModel(Base):
    """A bundle that a worker has loaded and run once, or why it could not."""

    __tablename__ = "warm_model"
    worker: Mapped[str] = mapped_column(String(120), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    error: Mapped[str | None] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())


def connect(url: str) -> Engine:
    """An engine for SQLite (WAL, foreign keys on) or PostgreSQL.

    On SQLite every transaction begins as a writer (BEGIN IMMEDIATE): a transaction that reads
    first and writes later would fail at once when another wrote in between, whatever the
    timeout. So keep transactions short: never hold one while a body streams or a child runs.

    `hide_parameters` keeps row values out of exceptions and logs (reliability.md, S8).
    """
    if not url.startswith("sqlite"):
        return create_engine(url, hide_parameters=True, pool_pre_ping=True)
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions whose objects stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)


def insert_if_absent(session: Session, table: type[Base], **values: Any) -> None:
    """Insert a row unless one with its key is there, without failing on a race."""
    dialect = session.get_bind().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    session.execute(insert(table).values(**values).on_conflict_do_nothing())


Row = TypeVar("Row", Run, Volume, Dataset, Batch)
Cursor = tuple[datetime, str]


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """Some rows, newest first, and where the next page begins (None at the end)."""

    items: Sequence[Row]
    next: Cursor | None


def page(
    session: Session, table: type[Row], *where: Any, size: int = 50, after: Cursor | None = None
) -> Page[Row]:
    """Rows of a table by (created_at, id), newest first; `after` is the last page's `next`."""
    key = tuple_(table.created_at, table.id)
    statement = select(table).where(*where)
    if after is not None:
        statement = statement.where(key < tuple_(literal(after[0], UtcDateTime()), after[1]))
    statement = statement.order_by(table.created_at.desc(), table.id.desc()).limit(size + 1)
    rows = session.scalars(statement).all()
    more = len(rows) > size
    return Page(rows[:size], (rows[size - 1].created_at, rows[size - 1].id) if more else None)
