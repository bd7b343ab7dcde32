"""Models are loaded before requests come for them."""

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service import pulse, registry, resident, warming
from service.db import WarmModel, WarmRequest, db_now
from service.errors import ServiceError
from service.settings import Settings
from service.storage import Store
from service.warmer import Warmer

_spec = importlib.util.spec_from_file_location(
    "tiny_bundles", Path(__file__).parents[1] / "models" / "conftest.py"
)
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)
make_bundle, random_encoder = _tiny.make_bundle, _tiny.random_encoder


@pytest.fixture
def settings(tmp_path):
    resident.cache_of.cache_clear()
    return Settings(data_dir=tmp_path, device="cpu", inference_threads=1, warm_wait_s=20.0)


@pytest.fixture
def digest(settings, make_bundle, random_encoder):
    return stored(settings, make_bundle(random_encoder))


def stored(settings, folder):
    return Store(settings.data_dir).publish_bundle(folder)


def register(sessions, digest, *, alias=None):
    with sessions() as session:
        version = registry.register(session, "enc", kind="encoder", digest=digest, manifest={})
        if alias is not None:
            registry.set_alias(session, "enc", alias, version.version, principal="t")
        session.commit()


def warmer(sessions, settings, name="w"):
    return Warmer(sessions, settings, Store(settings.data_dir), name)


def test_a_worker_loads_what_an_alias_points_at_and_no_other(sessions, settings, digest):
    one = warmer(sessions, settings)
    register(sessions, digest)
    assert one.once() == []

    register(sessions, digest, alias="champion")

    assert one.once() == [digest]
    held = resident.hold(settings, Store(settings.data_dir), digest)
    assert held.was_resident and held.session.num_runs > 1  # warmed up, and its pace measured


def test_without_a_live_worker_an_alias_may_move_at_once(sessions, settings, digest):
    warming.before_move(sessions, settings, digest)

    with sessions() as session:
        assert session.query(WarmRequest).count() == 0


def test_a_move_waits_until_every_live_worker_is_warm(sessions, settings, digest):
    for name in ("a", "b"):
        pulse.beat(sessions, name, "inference", "cpu")
    pulse.beat(sessions, "c", "train", "cpu")
    with ThreadPoolExecutor(1) as pool:
        move = pool.submit(warming.before_move, sessions, settings, digest)
        first, second = warmer(sessions, settings, "a"), warmer(sessions, settings, "b")
        while first.once() != [digest]:
            pass
        with sessions() as session:
            assert warming.lacking(session, digest).still == ["b"]
        assert not move.done()

        second.once()

        move.result(timeout=20.0)
    with sessions() as session:
        assert warming.lacking(session, digest) == warming.Lacking([], [])


def test_a_move_gives_up_when_workers_take_too_long(sessions, settings, digest):
    pulse.beat(sessions, "a", "inference", "cpu")
    impatient = settings.model_copy(update={"warm_wait_s": 0.05})

    with pytest.raises(ServiceError) as refused:
        warming.before_move(sessions, impatient, digest)

    assert (refused.value.status, refused.value.code) == (503, "model_not_warm")
    assert warmer(sessions, settings, "a").once() == [digest]  # the wish goes on
    warming.before_move(sessions, impatient, digest)


def test_a_model_that_a_worker_cannot_load_stops_the_move_until_it_can(
    sessions, settings, digest, monkeypatch
):
    pulse.beat(sessions, "a", "inference", "cpu")
    gpu = settings.model_copy(update={"provider": "tensorrt"})
    one, stop = warmer(sessions, gpu, "a"), threading.Event()

    def look():
        while not stop.is_set():
            one.once()

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            with pytest.raises(ServiceError) as refused:
                warming.before_move(sessions, settings, digest)
        finally:
            stop.set()
            looking.result()

    assert refused.value.code == "model_not_loadable"
    assert refused.value.extra == {"reason": "provider_unavailable"}
    with sessions() as session:
        warming.ask(session, digest, for_s=9.0)
        session.commit()
    assert warmer(sessions, settings, "a").once() == [digest]


def test_what_another_process_of_the_same_name_told_is_forgotten(sessions, settings, digest):
    with sessions() as session:
        session.add(WarmModel(worker="w", digest="0" * 64))
        session.commit()

    warmer(sessions, settings).once()

    with sessions() as session:
        assert session.query(WarmModel).count() == 0


def test_a_wish_ends(sessions, digest):
    with sessions() as session:
        session.add(WarmRequest(digest=digest, until=db_now(-1.0)))
        session.commit()
        assert warming.wanted(session) == []
        warming.ask(session, digest, for_s=60.0)
        session.commit()
        assert warming.wanted(session) == [digest]


def test_a_thread_looks_by_itself_until_it_is_stopped(sessions, settings, digest):
    register(sessions, digest, alias="champion")
    one = warmer(sessions, settings)

    one.start()
    try:
        cache = resident.cache_of(settings.session_cache_bytes)
        for _ in range(200):
            if cache.is_live(digest):
                break
            threading.Event().wait(0.05)
    finally:
        one.stop()

    assert cache.digests() == [digest]
