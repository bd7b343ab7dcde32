"""The pace of a network: measured, measured again while spoilt, learned from real runs."""

import numpy as np
import pytest

from models import memory, pace
from models.pace import Pace, _better, _judged, _Round

MB = 1 << 20


class Anything:
    """Stands where a session does; the probe is not really run."""


def rounds(*grown_mb, seconds=(1.0, 1.0, 1.0), waited=(0.0, 0.0, 0.0)):
    return [
        _Round(grown * MB, took, lost)
        for grown, took, lost in zip(grown_mb, seconds, waited, strict=True)
    ]


def test_equal_rounds_alone_on_the_machine_are_trusted():
    found = _judged(rounds(100, 104, 96), 10)

    assert found == Pace(10 * MB, 0.1, is_memory_spoilt=False, is_time_spoilt=False)


def test_another_thread_s_memory_spoils_a_probe_and_the_middle_round_stands_in():
    freed_beside = _judged(rounds(100, 0, 104), 1)
    taken_beside = _judged(rounds(100, 900, 104), 1)

    assert freed_beside.is_memory_spoilt and freed_beside.working_bytes == 100 * MB
    assert taken_beside.is_memory_spoilt and taken_beside.working_bytes == 104 * MB


def test_a_load_beside_spoils_the_time_unless_one_round_was_free_of_it():
    seconds = (3.0, 1.0, 2.0)

    under_load = _judged(rounds(1, 1, 1, seconds=seconds, waited=(2.0, 0.5, 1.0)), 1)
    once_free = _judged(rounds(1, 1, 1, seconds=seconds, waited=(2.0, 0.0, 1.0)), 1)

    assert under_load.is_time_spoilt and not once_free.is_time_spoilt
    assert under_load.seconds == once_free.seconds == 1.0


@pytest.mark.parametrize(
    ("known", "again", "expected"),
    [
        (Pace(9, 5, True, True), Pace(7, 2), Pace(7, 2)),
        (Pace(9, 5, True, True), Pace(7, 6, True, True), Pace(7, 5, True, True)),
        (Pace(9, 5, True, False), Pace(7, 2, False, True), Pace(7, 5)),
        (Pace(9, 5, False, True), Pace(7, 2, True, False), Pace(9, 2)),
    ],
)
def test_what_was_measured_well_stays_and_what_was_spoilt_is_replaced(known, again, expected):
    assert _better(known, again) == expected


def test_a_spoilt_pace_is_measured_again_and_a_good_one_never(monkeypatch):
    answers = [Pace(1, 9, True, True), Pace(1, 4, False, True), Pace(1, 2)]
    asked = []
    monkeypatch.setattr(pace, "_measured", lambda one: asked.append(one) or answers[len(asked) - 1])
    session = Anything()

    seen = [pace.pace_of(session).seconds for _ in range(5)]

    assert seen == [9, 4, 2, 2, 2]
    assert len(asked) == 3


def test_a_real_run_ends_the_doubt_about_the_time(monkeypatch):
    asked = []
    monkeypatch.setattr(
        pace, "_measured", lambda one: asked.append(one) or Pace(1, 9, is_time_spoilt=True)
    )
    session = Anything()
    pace.pace_of(session)

    pace.learn(session, 100, 50.0)

    assert pace.pace_of(session) == Pace(1, 0.5)
    assert len(asked) == 1


def test_a_real_network_is_measured(make_bundle, random_conv_model):
    from models.session import open_session

    session = open_session(make_bundle(random_conv_model, labels=("a", "b")), num_threads=1)

    found = pace.pace_of(session)

    assert 0 < found.seconds < 1e-2
    assert np.isfinite(found.working_bytes)


def test_working_memory_is_measured_of_a_network_that_has_run_before(tmp_path):
    from benchmarks import bundles
    from models.session import open_session

    folder = bundles.untrained(tmp_path / "wide", width=16, patch=(48, 48, 48))
    session = open_session(folder, num_threads=1)
    session.run(np.zeros((1, 1, 48, 48, 48), np.float32))

    assert pace.pace_of(session).working_bytes > 16 * 4  # a voxel of one feature map


def test_the_kernel_tells_how_long_this_thread_waited():
    before = memory.waited_s()
    sum(range(100_000))

    assert memory.waited_s() >= before >= 0.0
