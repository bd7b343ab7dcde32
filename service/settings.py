"""What an operator may set: environment variables with the prefix `PCRL_`, all in one place.

Without any, everything is embedded inside `data_dir` (SQLite, Celery's file-system broker); a
PostgreSQL or Redis that merely runs on the machine is ignored. Secrets may come from files, as
Docker gives them: `PCRL_DATABASE_URL_FILE=/run/secrets/database_url`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from imaging.identity import Policy

GIB = 1024**3


class Settings(BaseSettings):
    """The product's settings; frozen, so one object can be shared and used as a cache key."""

    model_config = SettingsConfigDict(env_prefix="PCRL_", frozen=True, extra="ignore")

    data_dir: Path = Field(
        default=Path("data"), description="Folder of the store, the work folders and the secrets."
    )
    database_url: str = Field(
        default="",
        repr=False,
        description="SQLAlchemy URL (`sqlite:///...` or `postgresql+psycopg://...`); "
        "empty is SQLite in `data_dir`.",
    )
    database_url_file: Path | None = Field(
        default=None, description="File that holds `database_url` (Docker secret)."
    )
    database_password_file: Path | None = Field(
        default=None, description="File with the password to put into `database_url`."
    )
    broker_url: str = Field(
        default="filesystem://",
        repr=False,
        description="Celery broker: `filesystem://` (in `data_dir/broker`) or `redis://...`.",
    )
    broker_url_file: Path | None = Field(
        default=None, description="File that holds `broker_url` (Docker secret)."
    )
    admin_token_file: Path | None = Field(
        default=None,
        description="File with the first admin token; without it one is made and printed once.",
    )
    host: str = Field(default="127.0.0.1", description="Address on which the API listens.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port of the API.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$",
        description="Where workers compute: `auto` takes what is there; `cuda`, or `cuda:1` for "
        "one GPU of several, refuses to fall back; `cpu`.",
    )
    lease_s: PositiveFloat = Field(
        default=30.0, description="How long a worker owns a run without a heartbeat."
    )
    heartbeat_s: PositiveFloat = Field(
        default=10.0, description="How often a worker renews its leases; below `lease_s`."
    )
    suspect_s: PositiveFloat = Field(
        default=15.0,
        description="How long an expired lease stays a suspicion before the run is taken back.",
    )
    max_attempts: PositiveInt = Field(
        default=3, description="Lost or crashed attempts after which a run fails."
    )
    stop_grace_s: PositiveFloat = Field(
        default=60.0, description="How long a training may write its checkpoint after SIGTERM."
    )
    stall_s: PositiveFloat = Field(
        default=3600.0, description="A training that reports nothing for so long is ended."
    )
    max_upload_bytes: PositiveInt = Field(
        default=8 * GIB, description="Largest upload that is accepted."
    )
    upload_hours: PositiveFloat = Field(
        default=24.0, description="How long an upload in pieces may rest before it is forgotten."
    )
    readers: PositiveInt = Field(
        default=3, description="Scans that the API reads at once; each may take 4 GiB of memory."
    )
    min_free_bytes: int = Field(
        default=1 * GIB, ge=0, description="Free disk space below which uploads are refused (507)."
    )
    deidentify: bool = Field(
        default=True,
        description="Remove patients' identities from every upload before it is kept.",
    )
    deidentify_dates: Literal["remove", "shift"] = Field(
        default="remove",
        description="Remove dates and times, or `shift` the dates of a patient by a secret number "
        "of days.",
    )
    accept_burned_in: bool = Field(
        default=False,
        description="Take in images whose pixels may show names (burned-in annotation, screens).",
    )
    session_cache_bytes: PositiveInt = Field(
        default=4 * GIB, description="Total size of the models an inference worker keeps loaded."
    )
    provider: Literal["auto", "cpu", "cuda", "tensorrt", "openvino"] = Field(
        default="auto",
        description="What runs models in inference workers; `auto` is what `PCRL_DEVICE` says. "
        "Another one never stands in, but see `PCRL_CPU_FALLBACK`.",
    )
    cpu_fallback: bool = Field(
        default=False,
        description="Run models on the CPU where the provider is not there; results say so in "
        "`fell_back_from`.",
    )
    precision: Literal["auto", "float32", "float16"] = Field(
        default="auto",
        description="`auto` takes a bundle's float16 network on a GPU if it passed parity, "
        "`float16` refuses bundles without.",
    )
    gpu_mem_limit_bytes: int = Field(
        default=0, ge=0, description="Most that one model may take on the GPU; 0 is no limit."
    )
    warm_wait_s: PositiveFloat = Field(
        default=60.0,
        description="How long moving an alias waits until every inference worker has the model "
        "loaded.",
    )
    embed_threads: PositiveInt = Field(
        default=4,
        description="Embeddings that an inference worker does at once; their windows share runs of "
        "the network.",
    )
    search_cache_bytes: int = Field(
        default=1 * GIB,
        ge=0,
        description="Embeddings that an API process keeps in memory for searching; 0 keeps none.",
    )
    inference_threads: int = Field(
        default=0, ge=0, description="Threads of onnxruntime in a worker; 0 is one a core."
    )
    inference_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Most that one segmentation may take beside the loaded models; 0 is what the "
        "machine and its control groups leave.",
    )
    train_threads: int = Field(
        default=0, ge=0, description="Threads of a training process; 0 is one a core."
    )
    train_processes: int = Field(
        default=1,
        ge=0,
        description="Processes that share each batch of a pretraining, one a GPU; 0 is one a "
        "visible GPU.",
    )
    max_queued: int = Field(
        default=10_000, ge=0, description="Runs of a project that may wait; more get 429. 0: any."
    )
    max_running: int = Field(
        default=0,
        ge=0,
        description="Runs of a project that are worked on at once in a queue; more wait. 0: any.",
    )
    max_stored_bytes: int = Field(
        default=0,
        ge=0,
        description="Bytes that a project's scans, begun uploads and sent models may take; "
        "more get 429. 0: any.",
    )
    wait_max_s: PositiveFloat = Field(
        default=60.0, description="Longest `Prefer: wait=N` that the API grants."
    )
    idempotency_hours: PositiveFloat = Field(
        default=24.0, description="How long an `Idempotency-Key` replays its first answer."
    )
    dispatch_interval_s: PositiveFloat = Field(
        default=2.0, description="Pause between two rounds of upkeep."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Lines of text, or one JSON object a line."
    )
    metrics_open: bool = Field(
        default=False,
        description="Let anybody who reaches the API read `/metrics`, without a token.",
    )
    queued_limit_s: PositiveFloat = Field(
        default=3600.0,
        description="A run that waits for so long while no worker works on its queue makes "
        "`/readyz` fail.",
    )
    results_days: float = Field(
        default=0.0,
        ge=0,
        description="Days until a segmentation's files are removed; 0 keeps them.",
    )
    originals_days: float = Field(
        default=0.0,
        ge=0,
        description="Days until the kept file is removed; the voxels stay. 0 keeps it.",
    )
    failed_work_days: float = Field(
        default=14.0,
        ge=0,
        description="Days until a failed training's work folder is removed; 0 keeps it.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe level that is logged."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        for name in ("database_url", "broker_url"):
            if path := values.get(f"{name}_file"):
                values[name] = _secret(Path(path))
        if path := values.get("database_password_file"):
            from sqlalchemy import make_url  # only here: settings must import fast

            if not values.get("database_url"):
                raise ValueError("database_password_file needs database_url")
            url = make_url(values["database_url"]).set(password=_secret(Path(path)))
            values["database_url"] = url.render_as_string(hide_password=False)
        data_dir = Path(values.get("data_dir") or "data").expanduser().absolute()
        values["data_dir"] = data_dir
        if not values.get("database_url"):
            values["database_url"] = f"sqlite:///{data_dir / 'pcrl.sqlite3'}"
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heartbeat_s >= self.lease_s:
            raise ValueError(f"heartbeat_s {self.heartbeat_s} must be below lease_s {self.lease_s}")
        if not self.broker_url.startswith(("filesystem://", "redis://", "rediss://", "unix://")):
            raise ValueError("broker_url must start with filesystem:// or redis://")
        if not self.database_url.startswith(("sqlite:", "postgresql+psycopg:")):
            raise ValueError("database_url must start with sqlite: or postgresql+psycopg:")
        return self

    def policy(self) -> Policy | None:
        """How identities are removed from uploads; None leaves them as they come."""
        if not self.deidentify:
            return None
        return Policy(dates=self.deidentify_dates, accept_burned_in=self.accept_burned_in)

    def shown(self, name: str) -> str:
        """A setting's value for a person to read; passwords in URLs are masked."""
        value = str(getattr(self, name))
        return re.sub(r"(?<=:)[^:/@]*(?=@)", "***", value) if name.endswith("_url") else value

    @property
    def is_embedded(self) -> bool:
        """Whether nothing outside `data_dir` is needed."""
        return self.broker_url.startswith("filesystem") and self.database_url.startswith("sqlite")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read from the environment once."""
    return Settings()


def _secret(path: Path) -> str:
    """Content of a secret file without its final newline; its path alone shows in errors."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"cannot read secret file {path}: {error.strerror}") from None
