"""Searching in memory: what the search in the database finds, and never what was removed."""

import numpy as np
import pytest
from sqlalchemy import delete, func, insert, select, update

from service import db, embeddings, spaces
from service.db import Blob, Embedding, EmbeddingChange, Run, Volume
from service.embeddings import Filters, NewEmbedding
from service.errors import ServiceError

ONE, OTHER = "1" * 64, "2" * 64
SHA = "a" * 64
PLENTY = 1 << 30


@pytest.fixture
def session(sessions):
    with sessions() as session:
        session.add(Blob(sha256=SHA, size_bytes=1))
        session.commit()
        yield session


def volume_id(number: int) -> str:
    return f"vol_{number:032x}"


def add_volumes(session, numbers, **facts) -> None:
    grid = {"shape": [4, 4, 4], "source_shape": [4, 4, 4], "spacing_mm": [1.0, 1.0, 1.0]}
    affines = {"affine": np.eye(4).tolist(), "source_affine": np.eye(4).tolist()}
    volume = {"kind": "image", "modality": "CT", "format": "nifti", "original_sha256": SHA}
    volume |= {"voxels_sha256": SHA, "intake": {}, "created_by": "t", **grid, **affines, **facts}
    run = {"kind": "embed", "state": "succeeded", "queue": "inference", "priority": 0, "spec": {}}
    run |= {"attempt": 1, "fence": 1, "created_by": "t"}
    for n in numbers:
        own = {"id": volume_id(n), "subject": f"s{n % 3}", "series_selector": str(n)}
        session.execute(insert(Volume).values(**volume, **own))
        session.execute(insert(Run).values(**run, id=f"emb_{n:032x}", volume_id=None))
    session.commit()


def put(session, number, vector, digest=ONE) -> None:
    new = NewEmbedding("enc", 1, digest, np.asarray(vector, np.float32))
    embeddings.record(session, f"emb_{number:032x}", volume_id(number), new)


def find(session, query, *, limit=5, max_bytes=PLENTY, digest=ONE, **filters):
    query = np.asarray(query, np.float64)
    asked = Filters(**filters)
    return spaces.search(session, query, digest, limit=limit, filters=asked, max_bytes=max_bytes)


def find_in_database(session, query, *, limit=5, **filters):
    query = np.asarray(query, np.float64)
    return embeddings.search(session, query, ONE, limit=limit, filters=Filters(**filters))


def vectors_of(count, dims=16, seed=1):
    return np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)


@pytest.fixture
def filled(session):
    vectors = vectors_of(60)
    vectors[10] = vectors[11] = 2.0 * vectors[12]  # ties
    vectors[20] = vectors[12] * (1.0 + 1e-6)
    vectors[21] = vectors[12] + 1e-6  # nearer than float32 can tell
    vectors[30] = 0.0
    add_volumes(session, range(50))
    add_volumes(session, range(50, 60), modality="MR")
    for number, vector in enumerate(vectors):
        put(session, number, vector)
    session.commit()
    return vectors


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"modality": "MR"},
        {"kind": "label"},
        {"not_subject": "s1"},
        {"modality": "CT", "not_subject": "s0"},
    ],
)
def test_memory_gives_what_the_database_gives(session, filled, filters):
    for limit in (1, 3, 60):
        for query in (filled[12], -filled[12], filled[3] + filled[55], np.zeros(16)):
            expected = find_in_database(session, query, limit=limit, **filters)
            assert find(session, query, limit=limit, **filters) == expected
    assert find(session, filled[12]) != find(session, filled[13])


def test_what_was_written_replaced_or_removed_by_anyone_counts_at_once(session, filled):
    query = filled[12]
    before = find(session, query, limit=60)
    session.execute(delete(Volume).where(Volume.id == volume_id(10)))  # a cascade
    session.execute(delete(Run).where(Run.id == f"emb_{12:032x}"))  # another one
    session.commit()
    put(session, 11, -query)
    add_volumes(session, [99])
    put(session, 99, query)
    put(session, 40, query, digest=OTHER)

    found = find(session, query, limit=60)

    assert found == find_in_database(session, query, limit=60)
    assert found != before
    assert found.num_compared == 59
    assert {one.volume_id: one.cosine for one in found.items}[volume_id(99)] == 1.0
    assert found.items[-1].volume_id == volume_id(11)
    assert not {volume_id(10), volume_id(12)} & {one.volume_id for one in found.items}


def test_only_what_changed_is_read_again(session, filled, monkeypatch):
    find(session, filled[0])

    def forbidden(*_):
        raise AssertionError("everything is read again")

    monkeypatch.setattr(spaces.Space, "_read_all", forbidden)
    put(session, 5, filled[6])
    assert find(session, filled[6]) == find_in_database(session, filled[6])
    session.execute(delete(EmbeddingChange))  # the record does not reach back
    session.commit()
    put(session, 5, filled[7])
    session.execute(delete(EmbeddingChange))
    session.commit()
    with pytest.raises(AssertionError, match="everything"):
        find(session, filled[6])


def test_a_copy_without_the_record_of_changes_would_find_what_was_removed(
    session, filled, monkeypatch
):
    """The negative control: it is the revision that keeps the copy true."""
    find(session, filled[0])
    monkeypatch.setattr(spaces.Space, "follow", lambda *_: None)
    add_volumes(session, [99])
    put(session, 99, filled[0])

    assert find(session, filled[0]) != find_in_database(session, filled[0])


def test_a_rolled_back_write_changes_nothing(session, filled):
    before = find(session, filled[0])
    session.execute(update(Embedding).values(vector=filled[1].tobytes()))
    session.rollback()

    assert find(session, filled[0]) == before


def test_bundles_that_do_not_fit_leave_memory_and_are_still_searched(session, filled):
    add_volumes(session, [99])
    put(session, 99, filled[0], digest=OTHER)
    one = 60 * (16 * 4 + spaces.ROW_BYTES)
    for max_bytes in (0, one - 1, one, PLENTY):
        found = find(session, filled[0], max_bytes=max_bytes)
        assert found == find_in_database(session, filled[0])
    find(session, filled[0], max_bytes=one)
    find(session, filled[0], max_bytes=one, digest=OTHER)

    held = spaces._spaces_of(session)

    assert list(held._spaces) == [("prj_default", OTHER, "")]
    assert sum(space.num_bytes for space in held._spaces.values()) <= one


def test_a_region_is_a_space_of_its_own(session, filled):
    for number in (3, 4):
        new = NewEmbedding("enc", 1, ONE, 2.0 * filled[number], "liver")
        embeddings.record(session, f"emb_{number:032x}", volume_id(number), new)
    session.commit()
    query = filled[3].astype(np.float64)

    def livers():
        asked = {"limit": 5, "filters": Filters(), "region": "liver"}
        found = spaces.search(session, query, ONE, max_bytes=PLENTY, **asked)
        assert found == embeddings.search(session, query, ONE, **asked)
        return found

    before = find(session, query)
    assert (livers().num_compared, before.num_compared) == (2, 60)
    assert livers().items[0].volume_id == volume_id(3)
    session.execute(
        delete(Embedding).where(Embedding.volume_id == volume_id(3), Embedding.region == "liver")
    )
    session.commit()
    assert [one.volume_id for one in livers().items] == [volume_id(4)]
    assert find(session, query) == before
    nothing = spaces.search(
        session, query, ONE, limit=5, filters=Filters(), max_bytes=PLENTY, region="lung"
    )
    assert nothing.num_compared == 0


def test_a_query_of_another_size_is_refused(session, filled):
    with pytest.raises(ServiceError, match="16"):
        find(session, [1.0, 2.0])


def test_the_record_of_changes_is_bounded_by_its_length(session, filled):
    session.execute(update(db.EmbeddingSpace).values(revision=20_000))
    session.commit()
    put(session, 3, filled[3])

    assert session.scalar(select(func.count()).select_from(EmbeddingChange)) == 1
    assert find(session, filled[3]) == find_in_database(session, filled[3])


@pytest.mark.parametrize("max_bytes", [PLENTY, 0])
def test_a_search_sees_its_projects_scans_alone_in_memory_and_in_the_database(
    session, sessions, max_bytes
):
    """The session of all projects is the control: it finds both."""
    session.add(db.Project(id="prj_other", name="other"))
    session.flush()
    add_volumes(session, [1])
    add_volumes(session, [2], project_id="prj_other")
    for number in (1, 2):
        put(session, number, [1.0, 0.0])
    session.commit()

    def found(project):
        with db.of_project(sessions, project)() as own:
            for _ in range(2):  # the second from memory
                there = find(own, [1.0, 0.0], max_bytes=max_bytes)
            return [one.volume_id for one in there.items], there.num_compared

    assert found("prj_default") == ([volume_id(1)], 1)
    assert found("prj_other") == ([volume_id(2)], 1)
    put(session, 2, [0.0, 1.0])  # another project's change
    session.commit()
    assert found("prj_default") == ([volume_id(1)], 1)
    assert find_in_database(session, [1.0, 0.0]).num_compared == 2
