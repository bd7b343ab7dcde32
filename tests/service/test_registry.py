"""The registry: versions count up, aliases move, and every move is remembered."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service import registry, runs
from service.errors import ServiceError


@pytest.fixture
def session(sessions):
    with sessions() as session:
        yield session


def register(session, name="liver", kind="segmenter", digest="a" * 64, **more):
    version = registry.register(session, name, kind=kind, digest=digest, manifest={}, **more)
    session.commit()
    return version


def test_versions_count_up_within_a_name(session):
    assert [register(session).version for _ in range(3)] == [1, 2, 3]
    assert register(session, name="lung").version == 1


def test_concurrent_registrations_get_different_versions(sessions):
    start = threading.Barrier(6)

    def one(_):
        start.wait()
        with sessions() as session:
            return register(session).version

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(one, range(6))) == [1, 2, 3, 4, 5, 6]


def test_a_run_registers_once(session):
    run = runs.create(session, kind="finetune", spec={}, principal="t")
    session.commit()

    first, again = register(session, run_id=run.id), register(session, run_id=run.id)

    assert (first.version, again.version) == (1, 1)
    assert registry.of_run(session, run.id) is again


def test_a_name_belongs_to_one_kind(session):
    register(session)

    with pytest.raises(ServiceError) as refused:
        register(session, kind="encoder")

    assert refused.value.code == "wrong_model_kind"


def test_references_resolve_to_versions(session):
    for digest in ("a", "b", "c"):
        register(session, digest=digest * 64)
    registry.set_alias(session, "liver", "champion", 2, principal="t")

    found = {
        ref: registry.resolve(session, ref).version
        for ref in ("liver", "models:/liver@champion", "liver/1", "liver@latest")
    }

    assert found == {"liver": 3, "models:/liver@champion": 2, "liver/1": 1, "liver@latest": 3}
    for ref, code in (
        ("lung", "not_found"),
        ("liver/9", "not_found"),
        ("liver@none", "not_found"),
        ("///", "invalid_request"),
    ):
        with pytest.raises(ServiceError) as refused:
            registry.resolve(session, ref)
        assert refused.value.code == code


def test_an_alias_moves_only_for_who_saw_its_revision(session):
    register(session)
    register(session)
    alias = registry.set_alias(session, "liver", "champion", 1, principal="anna")
    assert (alias.version, alias.revision) == (1, 1)
    alias = registry.set_alias(session, "liver", "champion", 2, principal="ben", if_match=1)
    assert (alias.version, alias.revision) == (2, 2)

    with pytest.raises(ServiceError) as refused:
        registry.set_alias(session, "liver", "champion", 1, principal="cem", if_match=1)
    assert (refused.value.status, refused.value.code) == (412, "precondition_failed")
    with pytest.raises(ServiceError):
        registry.delete_alias(session, "liver", "champion", principal="cem", if_match=1)

    registry.delete_alias(session, "liver", "champion", principal="anna", if_match=2)
    history = registry.alias_history(session, "liver", "champion")
    assert [(event.version, event.set_by) for event in history] == [
        (1, "anna"),
        (2, "ben"),
        (None, "anna"),
    ]


@pytest.mark.parametrize("alias", ["latest", "v3", "", "a b", "ä"])
def test_reserved_and_malformed_aliases_are_refused(session, alias):
    register(session)

    with pytest.raises(ServiceError) as refused:
        registry.set_alias(session, "liver", alias, 1, principal="t")

    assert refused.value.code == "invalid_request"
