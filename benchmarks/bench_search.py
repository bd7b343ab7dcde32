"""Similar cases: seconds of a warm search among 1 to 100,000 stored embeddings, and its recall.

The database is SQLite in a temporary folder; the vectors (N, E) are random, and every tenth is a
copy of another, so that there are ties. Recall is against all cosines in float64.

    python -m benchmarks.bench_search --json
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from benchmarks import common
from service import db, migrate, spaces
from service.db import Blob, Embedding, Run, Volume
from service.embeddings import Filters

DIGEST, SHA = "1" * 64, "a" * 64
LIMIT = 10
GOAL_MS = 50.0


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    counts = [1, 10, 100] if asked.smoke else [1, 10, 100, 1000, 10_000, 100_000]
    result: dict[str, object] = {"benchmark": "search", "dims": asked.dims, "rounds": asked.rounds}
    random = np.random.default_rng(0)
    vectors = random.standard_normal((counts[-1], asked.dims), dtype=np.float32)
    vectors[9::10] = vectors[8::10][: len(vectors[9::10])]
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'search.sqlite3'}"
        migrate.upgrade(url)
        engine = db.connect(url)
        with db.sessions(engine)() as session:
            session.add(Blob(sha256=SHA, size_bytes=1))
            session.commit()
            done = 0
            for count in counts:
                _fill(session, vectors, done, count)
                done = count
                result |= measure(session, vectors[:count], asked.rounds)
        engine.dispose()
    result["goal_ms"] = GOAL_MS
    common.show_table("Searching stored embeddings", result.items())
    if asked.json:
        common.show_json(result)


def measure(session: Session, vectors: npt.NDArray[np.float32], rounds: int) -> dict[str, object]:
    """First search (reads all), median and slowest of the warm ones, and recall."""
    count, dims = vectors.shape
    queries = np.random.default_rng(1).standard_normal((rounds + 1, dims))
    taken, hits = [], 0
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for query in queries:
        began = time.perf_counter()
        found = spaces.search(
            session, query, DIGEST, limit=LIMIT, filters=Filters(), max_bytes=1 << 30
        )
        taken.append(1000 * (time.perf_counter() - began))
        cosines = np.round(vectors @ query / lengths / np.linalg.norm(query), 12)
        best = np.lexsort((np.arange(count), -cosines))[:LIMIT]
        hits += len({int(one.volume_id[4:], 16) for one in found.items} & set(best.tolist()))
    return {
        f"first_ms_{count}": taken[0],
        f"warm_median_ms_{count}": statistics.median(taken[1:]),
        f"warm_slowest_ms_{count}": max(taken[1:]),
        f"recall_{count}": hits / (len(queries) * min(LIMIT, count)),
    }


def _fill(session: Session, vectors: npt.NDArray[np.float32], first: int, end: int) -> None:
    eye = np.eye(4).tolist()
    volume: dict[str, object] = {
        "kind": "image",
        "modality": "CT",
        "format": "nifti",
        "original_sha256": SHA,
    }
    volume |= {"voxels_sha256": SHA, "shape": [4, 4, 4], "spacing_mm": [1.0, 1.0, 1.0]}
    volume |= {"affine": eye, "source_shape": [4, 4, 4], "source_affine": eye, "intake": {}}
    run: dict[str, object] = {
        "kind": "embed",
        "state": "succeeded",
        "queue": "inference",
        "priority": 0,
        "spec": {},
    }
    run |= {"attempt": 1, "fence": 1}
    by = {"created_by": "bench"}
    model: dict[str, object] = {"bundle_digest": DIGEST, "model_name": "enc", "model_version": 1}
    for start in range(first, end, 2000):
        numbers = range(start, min(start + 2000, end))
        ids = [f"{n:032x}" for n in numbers]
        session.execute(
            insert(Volume),
            [
                {**volume, **by, "id": f"vol_{one}", "subject": one, "series_selector": one}
                for one in ids
            ],
        )
        session.execute(insert(Run), [{**run, **by, "id": f"emb_{one}"} for one in ids])
        session.execute(
            insert(Embedding),
            [
                {
                    **model,
                    "volume_id": f"vol_{one}",
                    "run_id": f"emb_{one}",
                    "dims": vectors.shape[1],
                    "vector": vectors[n].tobytes(),
                }
                for n, one in zip(numbers, ids, strict=True)
            ],
        )
        session.commit()
    session.execute(text("ANALYZE"))
    session.commit()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--smoke", action="store_true", help="small, in seconds")
    parser.add_argument("--dims", type=int, default=512, help="numbers of an embedding")
    parser.add_argument("--rounds", type=int, default=20, help="warm searches")
    return parser.parse_args()


if __name__ == "__main__":
    main()
