"""A large upload through a real API process: memory and time, whole and in pieces.

`python -m benchmarks.bench_upload --json`: a file of 2 GiB (zeros, sparse on the disk, so refused
as `not_a_scan` when all of it has arrived), sent by the product's own client both ways.
`growth_mib` is the rise of the API process' peak resident memory; the promise is 64 MiB
(reliability.md, T-L3). `vs_copy` is the time over that of copying the file with fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.real_api import MIB, Growth, RealApi
from service.client import ApiError, Client


def measure(size_bytes: int, folder: Path) -> dict[str, object]:
    """Send a file of zeros both ways; times in s."""
    path = folder / "zeros"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    result: dict[str, object] = {"size_mib": size_bytes // MIB, "copy_s": _copy_s(path)}
    with RealApi(folder / "data") as api, Client(api.url, api.token) as client:
        for way, send in (("whole", client.upload_whole), ("in_pieces", client.upload)):
            watched, start = Growth(api.pid), time.perf_counter()
            code = _send(send, path)
            seconds = time.perf_counter() - start
            result[way] = {
                "growth_mib": round(watched.mib, 1),
                "seconds": round(seconds, 2),
                "vs_copy": round(seconds / float(str(result["copy_s"])), 2),
                "answer": code,
            }
    return result


def _send(send: Callable[[Path], object], path: Path) -> str:
    try:
        send(path)
    except ApiError as error:
        return error.code
    return "accepted"


def _copy_s(path: Path) -> float:
    start = time.perf_counter()
    target = path.with_name("copy")
    with path.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, MIB)
        copy.flush()
        os.fsync(copy.fileno())
    target.unlink()
    return round(time.perf_counter() - start, 2)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="the default; for `make bench`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.mib * MIB, Path(folder))
    json.dump(result, sys.stdout)
    print(flush=True)


if __name__ == "__main__":
    main()
