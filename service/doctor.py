"""What an installation needs, examined without starting it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from models.bundle import BundleError
from models.session import available_providers
from service.celery_app import broker_errors, make_app
from service.db import connect
from service.migrate import is_current
from service.settings import Settings
from service.storage import Store


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    is_ok: bool
    detail: str


def examine(settings: Settings) -> list[Finding]:
    """Look at the interpreter, onnxruntime, torch, the readers' walls, store, database, broker."""
    return [
        _looked("python", _python),
        _looked("onnxruntime", lambda: _onnxruntime(settings)),
        _looked("torch (training workers only)", _torch),
        _looked("walls around readers of scans", _readers),
        _looked("store", lambda: _store(settings)),
        _looked("database", lambda: _database(settings)),
        _looked("broker", lambda: _broker(settings)),
    ]


class _Lacking(Exception):  # noqa: N818 - reads as what was found
    """What is wrong, in words for the operator."""


def _looked(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, is_ok=True, detail=look())
    except _Lacking as lack:
        return Finding(what, is_ok=False, detail=str(lack))


def _python() -> str:
    return sys.version.split()[0]


def _onnxruntime(settings: Settings) -> str:
    try:
        providers = available_providers()
    except BundleError as error:
        raise _Lacking(error.detail) from None
    if settings.device.startswith("cuda") and "CUDAExecutionProvider" not in providers:
        raise _Lacking(
            f"PCRL_DEVICE is {settings.device}, but the providers are {', '.join(providers)}"
        )
    return ", ".join(providers)


def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed; this installation serves, and trains nowhere"


def _readers() -> str:
    """Which walls a child process can put up around itself (imaging/confine.py)."""
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(  # our own module
        [sys.executable, "-m", "imaging.confine"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode != 0:
        raise _Lacking("the kernel or the container allows no seccomp filter: no scan can be read")
    return done.stdout.strip()


def _store(settings: Settings) -> str:
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.data_dir):
            free = Store(settings.data_dir).free_bytes()
    except OSError as error:
        raise _Lacking(f"cannot write to {settings.data_dir}: {error.strerror}") from None
    if free < settings.min_free_bytes:
        raise _Lacking(f"{free / 1e9:.1f} GB free, {settings.min_free_bytes / 1e9:.1f} GB needed")
    return f"{settings.data_dir}, {free / 1e9:.0f} GB free"


def _database(settings: Settings) -> str:
    engine = connect(settings.database_url)
    try:
        if not is_current(engine):
            raise _Lacking("not at this version's tables; run `pcrl migrate`")
        return f"{engine.dialect.name}, migrated"
    except SQLAlchemyError as error:
        raise _Lacking(f"does not answer ({type(error).__name__})") from None
    finally:
        engine.dispose()


def _broker(settings: Settings) -> str:
    try:
        with make_app(settings).connection_for_write(connect_timeout=2) as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
    except broker_errors() as error:
        raise _Lacking(f"does not answer ({type(error).__name__})") from None
    return "embedded (files)" if settings.broker_url.startswith("filesystem") else "redis"
