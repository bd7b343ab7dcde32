"""Atomic checkpoints that a killed run resumes from, bit for bit on a CPU.

A checkpoint is written beside its final name, fsynced, and renamed; the name carries the step and
the SHA-256 of the bytes, so a file that is cut off or rotten is seen before it is read. Writing
straight to the final name destroys the older checkpoint on a full disk (reliability.md, 3.5).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.bundle import sha256_of
from trainer import distributed
from trainer.errors import DataError, DiskFullError

FORMAT = 1
KEPT = 2
"""Newest checkpoints that stay."""

State = dict[str, Any]
"""Tensors, numbers, strings, and lists and dicts of them: what `weights_only` can load."""

_NAME = re.compile(r"^(?P<kind>[a-z]+)-(?P<step>\d{9})-(?P<sha256>[0-9a-f]{64})\.pt$")
_FULL_DISK_BYTES = 1 << 20


def save(folder: Path, step: int, state: State, *, kind: str = "step", keep: int = KEPT) -> Path:
    """Publish a checkpoint and drop older ones of its kind.

    Args:
        folder: Of the run's checkpoints; made if absent.
        step: Steps done.
        state: What `load_newest` shall give back.
        kind: `step` or `best`; each kind is counted for itself.
        keep: How many of this kind stay.

    Returns:
        The file.

    Raises:
        DiskFullError: No room; older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=folder)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        final = folder / f"{kind}-{step:09d}-{sha256_of(draft)}.pt"
        draft.rename(final)
    except (OSError, RuntimeError) as error:
        # torch.save on a full disk raises RuntimeError ("unexpected pos"), not OSError.
        draft.unlink(missing_ok=True)
        if _is_full(folder, error):
            raise DiskFullError(f"no room for the checkpoint of step {step}") from error
        raise
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _fsync_folder(folder)
    for old in list(_newest_first(folder, kind))[keep:]:
        if old != final:
            old.unlink(missing_ok=True)
    return final


def load_newest(
    folder: Path, *, kind: str = "step", warn: Callable[[str], None] = lambda _: None
) -> State | None:
    """The newest checkpoint that is whole, walking back over those that are not.

    Returns:
        The saved state with `step` and `format`; None if there is no whole checkpoint.
    """
    for path in _newest_first(folder, kind):
        if is_whole(path):
            return load(path)
        warn(f"checkpoint {path.name[:14]} is damaged; trying the one before")
    return None


def load(path: Path) -> State:
    """Read one checkpoint; never runs code from it.

    Raises:
        DataError: `bad_checkpoint`.
    """
    if not is_whole(path):
        raise DataError("bad_checkpoint", "the file differs from the SHA-256 in its name")
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise DataError("bad_checkpoint", f"format {state.get('format')}, expected {FORMAT}")
    return state


def is_whole(path: Path) -> bool:
    """Whether the file's bytes are those that its name promises."""
    match = _NAME.match(path.name)
    return match is not None and path.is_file() and sha256_of(path) == match["sha256"]


def clear_drafts(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for draft in folder.glob(".draft-*"):
        draft.unlink(missing_ok=True)


def check_same_run(state: State, *, recipe_digest: str, data_digest: str) -> None:
    """Refuse to resume another recipe or other data.

    Raises:
        DataError: `resume_mismatch`.
    """
    for name, expected in (("recipe_digest", recipe_digest), ("data_digest", data_digest)):
        if state.get(name) != expected:
            raise DataError(
                "resume_mismatch",
                f"the checkpoint in the output folder has another {name}; use an empty folder",
            )


def rng_state() -> State:
    """The global generators of torch, CUDA, numpy and Python.

    Training draws from per-step generators instead; these are kept so that code which draws from
    the global ones by accident still resumes exactly. numpy's and Python's go in as JSON, because
    `weights_only` refuses the objects they are.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": json.dumps(
            [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]
        ),
        "python": json.dumps([version, list(internal), gauss_next]),
    }


def restore_rng(state: State) -> None:
    """Put the global generators back; the last thing a resume does."""
    name, keys, position, has_gauss, gauss = json.loads(state["numpy"])
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss_next))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def fingerprint(device: torch.device) -> str:
    """What must be equal for a resume to be exact."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ranks = f", {distributed.num_ranks()} processes" if distributed.num_ranks() > 1 else ""
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads{ranks}"


def _newest_first(folder: Path, kind: str) -> Iterator[Path]:
    found = [
        (int(match["step"]), path.stat().st_mtime_ns, path)
        for path in folder.glob(f"{kind}-*.pt")
        if (match := _NAME.match(path.name)) is not None
    ]
    return (path for _, _, path in sorted(found, reverse=True))


def _is_full(folder: Path, error: Exception) -> bool:
    import errno

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return "unexpected pos" in str(error) or shutil.disk_usage(folder).free < _FULL_DISK_BYTES


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
