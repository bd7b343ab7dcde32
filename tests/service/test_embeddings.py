"""Stored embeddings: written with the run's success, searched exactly, never across bundles."""

import tracemalloc

import numpy as np
import pytest
from sqlalchemy import column, delete, func, insert, inspect, select, table, update

from service import db, embeddings, migrate, runs, volumes
from service.db import Blob, Embedding, Run, RunState, Volume
from service.embeddings import Filters, NewEmbedding
from service.errors import ServiceError
from service.runs import Fenced
from service.storage import Store

ONE, OTHER = "1" * 64, "2" * 64
SHA = "a" * 64
IDENTITY = np.eye(4).tolist()


@pytest.fixture
def session(sessions):
    with sessions() as session:
        session.add(Blob(sha256=SHA, size_bytes=1))
        session.commit()
        yield session


def volume_row(number: int, **facts) -> dict:
    return {
        "id": f"vol_{number:032x}",
        "kind": "image",
        "subject": f"s{number}",
        "modality": "CT",
        "format": "nifti",
        "original_sha256": SHA,
        "series_selector": str(number),
        "voxels_sha256": SHA,
        "shape": [4, 4, 4],
        "spacing_mm": [1.0, 1.0, 1.0],
        "affine": IDENTITY,
        "source_shape": [4, 4, 4],
        "source_affine": IDENTITY,
        "intake": {},
        "created_by": "t",
        **facts,
    }


def run_row(number: int, **facts) -> dict:
    return {
        "id": f"emb_{number:032x}",
        "kind": "embed",
        "state": "succeeded",
        "queue": "inference",
        "priority": 0,
        "spec": {"model": {"name": "enc", "version": 1, "digest": ONE}},
        "volume_id": f"vol_{number:032x}",
        "attempt": 1,
        "fence": 1,
        "created_by": "t",
        **facts,
    }


def fill(session, vectors, *, digest=ONE, first=0, **facts) -> None:
    """A volume, a run and a stored vector for each row of `vectors`, (N, E)."""
    numbers = range(first, first + len(vectors))
    session.execute(insert(Volume), [volume_row(number, **facts) for number in numbers])
    session.execute(insert(Run), [run_row(number) for number in numbers])
    store(session, vectors, digest=digest, first=first)


def store(session, vectors, *, digest=ONE, first=0) -> None:
    rows = [
        {
            "bundle_digest": digest,
            "volume_id": f"vol_{number:032x}",
            "model_name": "enc",
            "model_version": 1,
            "run_id": f"emb_{number:032x}",
            "dims": len(vector),
            "vector": np.asarray(vector, "<f4").tobytes(),
        }
        for number, vector in enumerate(vectors, start=first)
    ]
    session.execute(insert(Embedding), rows)
    session.commit()


def find(session, query, *, digest=ONE, limit=10, **filters):
    query = np.asarray(query, np.float64)
    return embeddings.search(session, query, digest, limit=limit, filters=Filters(**filters))


def numbers_of(found) -> list[int]:
    return [int(one.volume_id[4:], 16) for one in found.items]


def random_vectors(count: int, dims: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, dims)).astype(np.float32)


def by_definition(query, vectors, limit):
    """(cosine, number), the most alike first, ties by number; one by one, in double precision."""
    query = [float(value) for value in query]
    found = []
    for number, vector in enumerate(vectors):
        row = [float(value) for value in vector]
        dot = sum(a * b for a, b in zip(query, row, strict=True))
        lengths = sum(a * a for a in query) ** 0.5 * sum(b * b for b in row) ** 0.5
        found.append((dot / lengths, number))
    return sorted(found, key=lambda one: (-one[0], one[1]))[:limit]


@pytest.mark.parametrize("block_bytes", [4 << 20, 1000])  # one block, and one for every 7 vectors
def test_a_search_is_the_slow_definition(session, monkeypatch, block_bytes):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", block_bytes)
    vectors = random_vectors(100, 32)
    fill(session, vectors)

    for limit in (1, 7, 100):
        found = find(session, vectors[3], limit=limit)
        expected = by_definition(vectors[3], vectors, limit)
        assert numbers_of(found) == [number for _, number in expected]
        np.testing.assert_allclose(
            [one.cosine for one in found.items], [cosine for cosine, _ in expected], atol=1e-11
        )
        assert found.num_compared == 100

    assert numbers_of(find(session, vectors[3]))[0] == 3
    assert numbers_of(find(session, -vectors[3], limit=100))[-1] == 3


@pytest.mark.parametrize("block_bytes", [4 << 20, 60])
def test_ties_are_in_the_order_of_the_ids(session, monkeypatch, block_bytes):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", block_bytes)
    vectors = np.tile(random_vectors(1, 3), (20, 1))
    vectors[[4, 15]] *= -1
    fill(session, vectors)

    assert numbers_of(find(session, vectors[0], limit=6)) == [0, 1, 2, 3, 5, 6]


def test_lengths_do_not_matter_and_a_zero_vector_is_like_nothing(session):
    fill(session, [[1e-30, 2e-30], [1e30, 2e30], [0.0, 0.0], [-1.0, -2.0]])

    found = find(session, [1e-300, 2e-300])

    assert numbers_of(found) == [0, 1, 2, 3]
    cosines = [one.cosine for one in found.items]
    np.testing.assert_allclose(cosines, [1.0, 1.0, 0.0, -1.0], atol=1e-9)
    assert [one.cosine for one in find(session, [0.0, 0.0]).items] == [0.0] * 4


def test_vectors_of_another_bundle_are_never_compared(session):
    vectors = random_vectors(10, 8)
    fill(session, vectors)
    store(session, vectors[5:6], digest=OTHER, first=2)

    assert numbers_of(find(session, vectors[5], digest=OTHER)) == [2]
    found = find(session, vectors[5])
    assert (numbers_of(found)[0], found.num_compared) == (5, 10)
    assert find(session, vectors[5], digest="3" * 64).items == ()


def test_filters(session):
    vectors = random_vectors(9, 4)
    fill(session, vectors[:3], subject="same")
    fill(session, vectors[3:6], first=3, modality="MR")
    fill(session, vectors[6:], first=6, kind="labels")

    everything = set(range(9))
    assert set(numbers_of(find(session, vectors[0]))) == everything
    assert set(numbers_of(find(session, vectors[0], not_subject="same"))) == everything - {0, 1, 2}
    assert set(numbers_of(find(session, vectors[0], modality="MR"))) == {3, 4, 5}
    assert set(numbers_of(find(session, vectors[0], kind="labels"))) == {6, 7, 8}
    assert find(session, vectors[0], modality="MR").num_compared == 3
    assert find(session, vectors[0], modality="PT").items == ()


def test_a_query_of_another_size_is_refused(session):
    fill(session, random_vectors(2, 4))

    with pytest.raises(ServiceError, match=r"3 numbers, but .* have 4"):
        find(session, [1.0, 2.0, 3.0])
    assert len(find(session, [1e300, 1e-300, 0.0, 1e300]).items) == 2  # no overflow on the way


def finish_embedding(session, volume_id, vector, *, digest=ONE, fence=0):
    run = runs.create(session, kind="embed", spec={}, volume_id=volume_id, principal="t")
    session.commit()
    lease = runs.claim(session, run.id, "inference", "w")
    runs.started(session, lease)
    if fence:  # as if another worker had taken it over
        session.execute(update(Run).where(Run.id == run.id).values(fence=Run.fence + fence))
        session.commit()
    new = NewEmbedding("enc", 1, digest, np.asarray(vector, np.float32))
    runs.finish(
        session, lease, RunState.SUCCEEDED, result={"vector": 1}, outcome="done", vectors=[new]
    )
    return run.id


def test_the_vector_is_written_with_the_runs_success_and_replaced_by_the_next(session):
    session.execute(insert(Volume), [volume_row(1)])
    volume_id = f"vol_{1:032x}"

    finish_embedding(session, volume_id, [3.0, 4.0])
    second = finish_embedding(session, volume_id, [0.1, 0.2])

    row = session.execute(select(Embedding)).scalar_one()
    assert (row.run_id, row.dims, row.model_name, row.model_version) == (second, 2, "enc", 1)
    assert row.vector == np.array([0.1, 0.2], "<f4").tobytes()
    expected = np.array([0.1, 0.2], np.float32).astype(np.float64)
    np.testing.assert_array_equal(embeddings.of_volume(session, volume_id, ONE, "enc/1"), expected)
    with pytest.raises(ServiceError, match="not_embedded"):
        embeddings.of_volume(session, volume_id, OTHER, "enc/1")


def test_a_worker_that_lost_its_run_writes_no_vector(session):
    session.execute(insert(Volume), [volume_row(1)])

    with pytest.raises(Fenced):
        finish_embedding(session, f"vol_{1:032x}", [3.0, 4.0], fence=1)

    assert session.scalar(select(func.count()).select_from(Embedding)) == 0


@pytest.mark.parametrize("vector", [[], [[1.0]], [np.nan, 1.0]])
def test_a_vector_that_is_none_ends_nothing(session, vector):
    session.execute(insert(Volume), [volume_row(1)])

    with pytest.raises(ValueError, match="finite"):
        finish_embedding(session, f"vol_{1:032x}", vector)

    assert session.execute(select(Run.state)).scalar_one() == "running"


def test_an_embedding_goes_with_its_volume(session, tmp_path):
    fill(session, random_vectors(3, 4))
    gone = f"vol_{1:032x}"
    with pytest.raises(ServiceError, match="volume_in_use"):  # while its run refers to it
        volumes.delete(session, Store(tmp_path), gone)
    session.rollback()
    session.execute(update(Run).where(Run.volume_id == gone).values(volume_id=None))

    volumes.delete(session, Store(tmp_path), gone)

    assert numbers_of(find(session, [1.0, 0.0, 0.0, 0.0])) in ([0, 2], [2, 0])
    session.execute(delete(Run).where(Run.id == f"emb_{0:032x}"))
    session.commit()
    assert numbers_of(find(session, [1.0, 0.0, 0.0, 0.0])) == [2]


def test_the_migration_takes_in_what_there_is_and_goes_down_with_rows(database_url):
    migrate.upgrade(database_url, "0002")
    engine = db.connect(database_url)
    vectors = random_vectors(450, 3)  # more than two of the migration's blocks
    with db.sessions(engine)() as session:
        session.add(Blob(sha256=SHA, size_bytes=1))
        session.flush()
        session.execute(insert(Volume), [volume_row(number) for number in range(460)])
        results = [
            {"vector": [float(value) for value in vector], "bundle_digest": ONE}
            for vector in vectors
        ]
        rows = [run_row(number, result=result) for number, result in enumerate(results)]
        again = {**results[7], "vector": [1.0, 2.0, 3.0]}
        rows += [
            run_row(1000, volume_id=f"vol_{7:032x}", result=again, created_at=db.db_now(60.0)),
            run_row(1001, volume_id=f"vol_{451:032x}", result={"vector": [None]}),
            run_row(1002, volume_id=f"vol_{452:032x}", result=results[0], state="failed"),
            run_row(1003, volume_id=f"vol_{453:032x}", result=results[0], kind="segment"),
            run_row(1004, volume_id=f"vol_{454:032x}", result=None),
        ]
        there = {found["name"] for found in inspect(session.connection()).get_columns("run")}
        columns = [column(one.name, one.type) for one in Run.__table__.c if one.name in there]
        of_then = table("run", *columns)
        for row in rows:
            row = {"attempt": 0, "fence": 0, "priority": 0, **row}
            session.execute(insert(of_then).values(**row))
        session.commit()

        for _ in range(2):
            migrate.upgrade(database_url)
            found = {row.volume_id: row for row in session.execute(select(Embedding)).scalars()}
            session.commit()
            assert set(found) == {f"vol_{number:032x}" for number in range(450)}
            for number in (0, 199, 200, 449):
                row = found[f"vol_{number:032x}"]
                assert row.vector == vectors[number].astype("<f4").tobytes()
                assert (row.run_id, row.bundle_digest) == (f"emb_{number:032x}", ONE)
            newest = found[f"vol_{7:032x}"]
            assert newest.run_id == f"emb_{1000:032x}"
            assert newest.vector == np.array([1, 2, 3], "<f4").tobytes()
            session.expunge_all()
            migrate.downgrade(database_url, "0002")
            assert "embedding" not in inspect(engine).get_table_names()
            assert session.scalar(select(func.count()).select_from(Run)) == len(rows)
            session.commit()
    engine.dispose()


@pytest.mark.parametrize(
    "database_url",
    ["sqlite", pytest.param("postgresql", marks=[pytest.mark.services, pytest.mark.nightly])],
    indirect=True,
)
def test_ten_thousand_vectors_are_searched_in_bounded_memory(session):
    vectors = random_vectors(10_000, 512)  # 20 MiB, of which a block is 4 MiB
    for start in range(0, 10_000, 1000):
        fill(session, vectors[start : start + 1000], first=start)
    tracemalloc.start()

    found = find(session, vectors[1234])

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.num_compared == 10_000
    assert numbers_of(found)[0] == 1234
    assert found.items[0].cosine == 1.0
    assert peak < 10 * embeddings.BLOCK_BYTES
