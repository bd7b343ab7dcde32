"""The models that an inference worker keeps loaded, and what it does when memory runs out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from models.bundle import BundleError
from models.session import (
    HOST,
    OUT_OF_MEMORY,
    OnnxSession,
    ProviderOptions,
    SessionCache,
    give_memory_back,
    open_session,
)
from service.settings import Settings
from service.storage import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held:
    """A loaded model, and how it came to be there."""

    session: OnnxSession
    was_resident: bool
    """False: this request waited for it to be loaded."""
    opened_s: float
    retried_after: str | None = None
    """`host_out_of_memory` or `gpu_out_of_memory` of the attempt before, whose batch was larger."""

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        found: dict[str, Any] = {
            "bundle_digest": self.session.digest,
            "provider": self.session.provider,
            "precision": self.session.precision,
            "model_was_resident": self.was_resident,
        }
        if self.session.fell_back_from is not None:
            found["fell_back_from"] = self.session.fell_back_from
        if self.retried_after is not None:
            found["retried_after"] = self.retried_after
        return found


def device_of(settings: Settings) -> str:
    """Where inference runs: `PCRL_PROVIDER`, and for its `auto` what `PCRL_DEVICE` says.

    `auto` of both is CUDA where both the GPU and its runtime are, else the CPU.
    """
    if settings.provider != "auto":
        return settings.provider
    if settings.device != "auto":
        return settings.device
    try:
        metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError:
        return "cpu"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@cache
def cache_of(max_bytes: int) -> SessionCache:
    """This process' resident sessions."""
    return SessionCache(max_bytes)


def hold(settings: Settings, store: Store, digest: str) -> Held:
    """The model of a bundle, loaded if it is not resident.

    Raises:
        BundleError: See `models.session.open_session`.
    """
    began = time.monotonic()
    sessions = cache_of(settings.session_cache_bytes)
    was_resident = sessions.is_live(digest)
    session = sessions.get(digest, lambda: _open(settings, store, digest))
    return Held(session, was_resident, time.monotonic() - began)


def coarse_of(settings: Settings, store: Store, held: Held) -> OnnxSession | None:
    """The network that finds the organ, where a bundle brings one of its own; it stays loaded too.

    Raises:
        BundleError: See `models.session.open_session`.
    """
    spec = held.session.manifest.cascade
    if spec is None or spec.coarse is None:
        return None
    digest = held.session.digest
    found = cache_of(settings.session_cache_bytes).get(
        coarse_key(digest), lambda: _open(settings, store, digest, part="coarse")
    )
    at_once = held.session.max_batch
    return found if at_once is None else replace(found, max_batch=at_once)


def is_whole(settings: Settings, digest: str) -> bool:
    """Whether a bundle is loaded with every network that it brings."""
    cache = cache_of(settings.session_cache_bytes)
    session = cache.peek(digest)
    if session is None:
        return False
    spec = session.manifest.cascade
    return spec is None or spec.coarse is None or cache.is_live(coarse_key(digest))


def coarse_key(digest: str) -> str:
    """Under which a bundle's coarse network is kept."""
    return f"{digest}/coarse"


def using(settings: Settings, store: Store, digest: str, work: Callable[[Held], T]) -> T:
    """Work with a model; if memory runs out, once more with a fresh one and windows one by one.

    Whatever happens, no session of a failed attempt stays: its memory goes back to the system, and
    the next request begins from nothing.

    Args:
        settings: Where and how it runs.
        store: Where the bundle lies.
        digest: The bundle.
        work: Must leave nothing behind when it raises for want of memory.

    Raises:
        BundleError: As from `open_session` and `OnnxSession.run`.
    """
    try:
        return work(hold(settings, store, digest))
    except (BundleError, MemoryError) as error:  # its traceback holds the session: leave this first
        code, _ = _lack_of_memory(error)
    logger.warning("%s: once more, window by window", code)
    forget(settings, digest)
    try:
        held = hold(settings, store, digest)
        one_by_one = replace(held.session, max_batch=1)  # for this request; others are as before
        return work(Held(one_by_one, False, held.opened_s, retried_after=code))
    except (BundleError, MemoryError) as error:
        code, detail = _lack_of_memory(error)
    forget(settings, digest)
    raise BundleError(code, detail)


def forget(settings: Settings, digest: str) -> None:
    """Drop a session and every one that no alias points at, and give their memory back."""
    sessions = cache_of(settings.session_cache_bytes)
    sessions.drop(digest)
    sessions.drop(coarse_key(digest))
    sessions.drop_unpinned()
    give_memory_back()


def _lack_of_memory(error: BundleError | MemoryError) -> tuple[str, str]:
    """Code and detail if memory was lacking; any other error goes on."""
    if isinstance(error, MemoryError):
        return HOST, "the worker ran out of memory"
    if error.code not in OUT_OF_MEMORY:
        raise error
    return error.code, error.detail


def _open(
    settings: Settings,
    store: Store,
    digest: str,
    *,
    part: Literal["model", "coarse"] = "model",
) -> OnnxSession:
    return open_session(
        store.bundle_dir(digest),
        device=device_of(settings),
        num_threads=settings.inference_threads,
        digest=digest,
        options=ProviderOptions(
            gpu_mem_limit_bytes=settings.gpu_mem_limit_bytes or None,
            engine_cache_dir=settings.data_dir / "engines",
            num_threads=settings.inference_threads,
        ),
        cpu_fallback=settings.cpu_fallback,
        precision=settings.precision,
        part=part,
    )
