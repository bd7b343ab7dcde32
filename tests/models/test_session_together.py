import threading

import numpy as np
import pytest

from models.bundle import BundleError
from models.session import SessionCache, open_session
from models.session.coalesce import MAX_VOXELS, Coalescer


class Slow:
    """A network that doubles, whose first run lasts until it is let go."""

    def __init__(self):
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.batches = []

    def __call__(self, batch, _release):
        self.batches.append(len(batch))
        if len(self.batches) == 1:
            self.entered.set()
            assert self.go_on.wait(10.0)
        if (batch == 13.0).any():
            raise BundleError("inference_failed", "13")
        if len(batch) > 1 and (batch == 17.0).any():
            raise MemoryError
        return (batch * 2.0,)


def ask_all(values, shape=(1, 1, 2, 2, 2)):
    """One run under way, then a thread for each value; answers or errors by value."""
    network = Slow()
    together = Coalescer(network)
    found = {}

    def ask(value):
        try:
            (found[value],) = together(np.full(shape, value, np.float32), False)
        except BundleError as error:
            found[value] = error

    first = threading.Thread(target=ask, args=(1.0,))
    first.start()
    assert network.entered.wait(10.0)
    others = [threading.Thread(target=ask, args=(value,)) for value in values]
    for thread in others:
        thread.start()
    while len(together._waiting) < len(values):
        pass
    network.go_on.set()
    for thread in (first, *others):
        thread.join(10.0)
    return found, network


def test_what_arrives_during_a_run_is_run_together():
    found, network = ask_all([2.0, 3.0, 4.0])

    assert network.batches == [1, 3]
    for value in (1.0, 2.0, 3.0, 4.0):
        np.testing.assert_array_equal(found[value], np.full((1, 1, 2, 2, 2), 2 * value))


def test_a_batch_that_spoils_a_run_fails_alone():
    found, network = ask_all([2.0, 13.0, 4.0])

    assert network.batches == [1, 3, 1, 1, 1]
    assert isinstance(found[13.0], BundleError)
    np.testing.assert_array_equal(found[4.0], np.full((1, 1, 2, 2, 2), 8.0))


def test_a_batch_too_large_for_memory_is_run_in_its_parts():
    found, network = ask_all([2.0, 17.0, 4.0])

    assert network.batches == [1, 3, 1, 1, 1]
    assert len(found) == 4


def test_large_batches_are_not_run_together():
    found, network = ask_all([2.0, 3.0], shape=(1, 1, 1, 1, MAX_VOXELS // 2 + 1))

    assert network.batches == [1, 1, 1]
    assert len(found) == 3


def test_of_the_smallest_batches_nothing_is_run_together_where_that_gains_nothing():
    network = Slow()
    together = Coalescer(network, max_voxels=0)
    threads = [
        threading.Thread(target=together, args=(np.full((1, 1, 2, 2, 2), value), False))
        for value in (1.0, 2.0, 3.0)
    ]
    threads[0].start()
    assert network.entered.wait(10.0)
    for thread in threads[1:]:
        thread.start()
    while len(together._waiting) < 2:
        pass
    network.go_on.set()
    for thread in threads:
        thread.join(10.0)

    assert network.batches == [1, 1, 1]


def test_the_network_serves_in_the_order_of_arrival():
    """A caller that asks again at once does not push in."""
    entered, go_on, served = threading.Event(), threading.Event(), []

    def run(batch, _release):
        served.append(float(batch.flat[0]))
        entered.set()
        assert go_on.wait(10.0)
        return (batch,)

    together = Coalescer(run, max_voxels=0)

    def ask(value, times):
        for _ in range(times):
            together(np.full((1, 1), value), False)

    threads = [threading.Thread(target=ask, args=(1.0, 4))]
    threads[0].start()
    assert entered.wait(10.0)
    for value in (2.0, 3.0):
        threads.append(threading.Thread(target=ask, args=(value, 1)))
        threads[-1].start()
        while len(together._waiting) < len(threads) - 1:
            pass
    go_on.set()
    for thread in threads:
        thread.join(10.0)

    assert served == [1.0, 2.0, 3.0, 1.0, 1.0, 1.0]


def test_a_lone_caller_waits_for_nobody():
    network = Coalescer(lambda batch, _release: (batch,))

    for _ in range(3):
        network(np.zeros((1, 1, 2, 2, 2), np.float32), True)

    assert network.num_runs == 3


def test_eight_threads_get_the_answers_of_one(make_bundle, random_encoder):
    session = open_session(make_bundle(random_encoder), num_threads=1)
    batches = np.random.default_rng(0).normal(size=(8, 4, 1, 16, 16, 8)).astype(np.float32)
    expected = [session.run(batch) for batch in batches]
    found = {}
    start = threading.Barrier(8)

    def ask(index):
        start.wait()
        found[index] = session.run(batches[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for index in range(8):
        np.testing.assert_allclose(found[index], expected[index], atol=1e-6)
    assert not np.allclose(found[0], found[1])


@pytest.fixture
def opener(make_bundle, thresholds):
    folder = make_bundle(thresholds())
    return lambda: open_session(folder, num_threads=1)


def test_a_pinned_model_never_leaves(opener):
    size = opener().size_bytes
    cache = SessionCache(2 * size)
    cache.pin(["live"])

    for name in ("live", "a", "b", "c", "d"):
        cache.get(name, opener)

    assert cache.digests() == ["live", "d"]
    cache.pin([])  # the alias moved on: it is like any other now
    for name in ("a", "b"):
        cache.get(name, opener)
    assert cache.digests() == ["a", "b"]


def test_pinned_models_stay_though_they_cost_more_than_allowed(opener, caplog):
    cache = SessionCache(1)
    cache.pin(["a", "b"])

    for name in ("a", "b", "c"):
        cache.get(name, opener)

    assert cache.digests() == ["a", "b"]
    assert "PCRL_SESSION_CACHE_BYTES" in caplog.text


def test_a_dropped_model_is_loaded_anew(opener):
    cache = SessionCache(10**9)
    cache.pin(["a"])
    first = cache.get("a", opener)

    cache.drop("a")

    assert not cache.is_live("a")
    assert cache.get("a", opener) is not first
    assert cache.num_loads == 2


def test_only_live_models_stay_when_memory_is_short(opener):
    cache = SessionCache(10**9)
    cache.pin(["live"])
    for name in ("a", "live", "b"):
        cache.get(name, opener)

    cache.drop_unpinned()

    assert cache.digests() == ["live"]
    assert not cache.is_live("a")
