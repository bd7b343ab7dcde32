"""A model from elsewhere, opened in a child process with limits: hostile bytes meet nothing else.

    python -m models.incoming --out=FOLDER --confine=PID -- FILE

The file is a zip or an uncompressed tar of one bundle. Names in it only tell the parts apart:
`model.onnx`, `manifest.json`, and perhaps `card.md`, `weights.safetensors`, `reference.npy` and the
networks of another precision or pass (`models.bundle`), in one folder or in none. A bundle of ours
keeps every byte, and so its digest. A bare `model.onnx` with a manifest whose `files` are empty is
completed: digests, and a card that says where it came from.

The child gives up network, other programs and files (`imaging.confine`) before it reads a byte; it
refuses pickles (whatever is not safetensors), external data, operators beyond ONNX's own, loops;
opens a session and runs one window of zeros. What passed lies in FOLDER/bundle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import ValidationError

from imaging import confine
from imaging.archive import is_zip, open_members
from imaging.errors import ScanError
from models import bundle
from models.bundle import BundleError, Manifest
from models.onnx_wire import has_external_data, refused_operators
from models.session import Precision, open_session

_ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = {
    bundle.MODEL: (2 << 30) - 1,  # protobuf's own limit
    bundle.MODEL_FLOAT16: (2 << 30) - 1,
    bundle.COARSE: (2 << 30) - 1,
    bundle.WEIGHTS: 4 << 30,
    bundle.MANIFEST: 1 << 20,
    bundle.CARD: 1 << 20,
    bundle.REFERENCE: 64 << 20,
}
"""What a bundle may hold, and how large each part may be, unpacked."""
MAX_PARTS = 16
MAX_RATIO = 200
"""Unpacked to packed size: weights hardly compress, a bomb does a thousandfold."""
MEMORY_BYTES = 12 << 30
CPU_S, WALL_S = 600, 900.0
CHUNK_BYTES = 1 << 20
_REFUSED = 3


def open_in_child(path: Path, out_dir: Path) -> Path:
    """Unpack and prove a model in a confined child process; blocks until it ends.

    Args:
        path: The file that was sent.
        out_dir: Existing, empty folder.

    Returns:
        The folder of a verified bundle, below `out_dir`.

    Raises:
        BundleError: `import_refused` or the code of what is wrong with the bundle.
    """
    command = [
        *(sys.executable, "-s", "-P", "-m", "models.incoming"),
        *(f"--out={out_dir.resolve()}", f"--confine={os.getpid()}", "--", str(path.resolve())),
    ]
    environment = {
        "PYTHONPATH": str(_ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(out_dir.resolve()),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile(dir=out_dir) as told:
        process = subprocess.Popen(  # noqa: S603  # our own module; the path is one argument
            command,
            cwd=out_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout=WALL_S)
        except subprocess.TimeoutExpired:
            raise BundleError("import_refused", f"opening it took more than {WALL_S:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        told.seek(0)
        output = told.read(1 << 20)
    if process.returncode == 0:
        return out_dir / "bundle"
    if process.returncode == _REFUSED:
        error = json.loads(output)
        raise BundleError(str(error["code"]), str(error["detail"]))
    ended = f"signal {-process.returncode}" if process.returncode < 0 else "an error"
    raise BundleError("import_refused", f"what opens it ended with {ended}")


def unpack(path: Path, folder: Path) -> None:
    """Write the parts of a bundle into a folder under their own names.

    Raises:
        BundleError: `import_refused`.
        ScanError: Of a zip that is not safe to open (`imaging.archive`).
    """
    folder.mkdir()
    with path.open("rb") as file:
        start = file.read(4)
    parts = _of_zip(path) if is_zip(start) else _of_tar(path)
    packed, written = path.stat().st_size, 0
    homes: set[str] = set()
    for place, (name, source) in enumerate(parts):
        if place >= MAX_PARTS:
            raise BundleError("import_refused", f"more than {MAX_PARTS} files")
        home, _, part = name.replace("\\", "/").rpartition("/")
        if part not in MAX_BYTES or "/" in home:
            known = ", ".join(MAX_BYTES)
            raise BundleError("import_refused", f"file {place} is none of {known} in one folder")
        homes.add(home)
        if len(homes) > 1 or (folder / part).exists():
            raise BundleError("import_refused", "more than one bundle in the file")
        size = _copy(source, folder / part, MAX_BYTES[part])
        written += size
        if written > MAX_RATIO * packed:
            raise BundleError("import_refused", f"it unpacks to over {MAX_RATIO} times its size")
    for part in (bundle.MODEL, bundle.MANIFEST):
        if not (folder / part).is_file():
            raise BundleError("import_refused", f"there is no {part}")


def complete(folder: Path) -> None:
    """Give a bare model what a bundle has: digests of its files, and a card.

    Raises:
        BundleError: `bundle_invalid`.
    """
    try:
        manifest = Manifest.model_validate_json((folder / bundle.MANIFEST).read_bytes())
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in found["loc"])
        raise BundleError(
            "bundle_invalid",
            f"{bundle.MANIFEST}: {error.error_count()} errors; {where}: {found['msg']}",
        ) from None
    if manifest.files:
        return  # a bundle of ours: not a byte changes
    card = folder / bundle.CARD
    if not card.exists():
        card.write_text(
            f"# Imported {manifest.kind}\n\n**{manifest.intended_use.capitalize()}.**\n\n"
            "It came as an ONNX file with a description; nothing is known of it beyond that.\n"
        )
    digests = {
        one.name: bundle.sha256_of(one)
        for one in sorted(folder.iterdir())
        if one.name != bundle.MANIFEST
    }
    whole = manifest.model_copy(update={"files": digests})
    (folder / bundle.MANIFEST).write_text(whole.model_dump_json(indent=2), encoding="utf-8")


def prove(folder: Path) -> None:
    """Hold the bundle to its manifest, open it, and run one window of zeros.

    Raises:
        BundleError: What is wrong with it.
    """
    manifest = bundle.load(folder)
    if extra := {one.name for one in folder.iterdir()} - {*manifest.files, bundle.MANIFEST}:
        raise BundleError("import_refused", f"{', '.join(sorted(extra))}: not in the manifest")
    if set(manifest.files) - set(MAX_BYTES):
        raise BundleError("import_refused", "the manifest names files that a bundle does not have")
    for name in (bundle.MODEL, bundle.MODEL_FLOAT16, bundle.COARSE):
        if (folder / name).exists():
            _check_operators(folder / name)
    if (folder / bundle.WEIGHTS).exists():
        _check_safetensors(folder / bundle.WEIGHTS)
    _run_once(folder)
    if bundle.MODEL_FLOAT16 in manifest.files:
        _run_once(folder, precision="float16")
    if bundle.COARSE in manifest.files:
        _run_once(folder, part="coarse")


def _run_once(
    folder: Path,
    *,
    precision: Precision = "float32",
    part: Literal["model", "coarse"] = "model",
) -> None:
    session = open_session(
        folder,
        device="cpu",
        num_threads=1,
        run_limit_s=CPU_S / 2,
        precision=precision,
        part=part,
    )
    shape = (1, len(session.manifest.channels), *session.manifest.patch_size)
    try:
        session.run(np.zeros(shape, dtype=np.float32))
    except ValueError:
        raise BundleError("bundle_inconsistent", f"the input does not take {shape}") from None


def _check_operators(model: Path) -> None:
    data = model.read_bytes()
    try:
        external, refused = has_external_data(data), refused_operators(data)
    except (ValueError, RecursionError):
        raise BundleError("bundle_invalid", f"{bundle.MODEL} is no ONNX file") from None
    if external:
        raise BundleError("external_data", f"{bundle.MODEL} wants tensors from other files")
    if refused:
        raise BundleError("import_refused", f"operators that are not let in: {refused[:5]}")


def _check_safetensors(path: Path) -> None:
    """A header of JSON and numbers behind it; anything else, a pickle say, is refused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 64 << 20):
            raise BundleError("import_refused", f"{path.name} is no safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise BundleError("import_refused", f"{path.name} is no safetensors file")


def _of_zip(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with open_members(path) as members:
        for member in members:
            with member() as source:
                yield member.name, source


def _of_tar(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                if entry.isdir():
                    continue
                source = (
                    archive.extractfile(entry) if entry.isreg() and not entry.issparse() else None
                )
                if source is None:
                    raise BundleError("import_refused", "a file of the tar is a link or a device")
                with source:
                    yield entry.name, source
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise BundleError("import_refused", "the file is neither a zip nor a plain tar") from error


def _copy(source: IO[bytes], target: Path, limit: int) -> int:
    size = 0
    with target.open("xb") as file:
        while chunk := source.read(CHUNK_BYTES):
            size += len(chunk)
            if size > limit:
                raise BundleError("import_refused", f"{target.name} has more than {limit} bytes")
            file.write(chunk)
    return size


@contextmanager
def _quiet() -> Iterator[None]:
    """Native code may print; the answer must stand alone on the standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(null)
        os.close(kept)


def main(arguments: list[str] | None = None) -> int:
    """The child: 0, or 3 with `{code, detail}` on the standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--confine", type=int, required=True)
    parser.add_argument("path", type=Path)
    options = parser.parse_args(arguments)
    folder = options.out / "bundle"
    answer: dict[str, Any]
    try:
        with _quiet():  # opens /dev/null to write, which the walls forbid
            confine.confine(
                memory_bytes=MEMORY_BYTES,
                cpu_s=CPU_S,
                file_bytes=max(MAX_BYTES.values()),
                open_files=256,
                parent_pid=options.confine,
                readable=(options.path, _ROOT / "models"),
                writable=options.out,
            )
            unpack(options.path, folder)
            complete(folder)
            prove(folder)
        return 0
    except (BundleError, ScanError) as error:
        answer = {"code": error.code, "detail": error.detail}
    except MemoryError:
        answer = {"code": "import_refused", "detail": "it takes more memory than is allowed"}
    shutil.rmtree(folder, ignore_errors=True)
    json.dump(answer, sys.stdout)
    return _REFUSED


if __name__ == "__main__":
    sys.exit(main())
