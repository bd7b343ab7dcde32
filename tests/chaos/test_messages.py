"""The broker may lose, double, shuffle and refuse messages, and clocks may differ: runs go on."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from service import celery_app, db

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(240)]


def test_t_c5_runs_accepted_while_redis_is_down_are_done_soon_after_it_is_back(
    own_redis, settings_of, service_of, quick_tasks, workers, tmp_path
):
    settings = settings_of(broker_url=f"redis://127.0.0.1:{own_redis.port}/0")
    service = service_of(settings)
    log = tmp_path / "worker.log"
    with workers.worker(settings, "inference", log, include=quick_tasks):
        before = service.post()
        workers.wait_for(
            lambda: service.have_ended([before]), timeout_s=90, what="for the first run"
        )
        workers.wait_for(  # till then it looks for more without being rung for
            lambda: "succeeded in" in log.read_text(), timeout_s=30, what="for the end of the task"
        )

        own_redis.kill()
        assert not celery_app.ring("x", "inference", settings=settings)  # the control: it is down
        accepted = [service.post(ring=False) for _ in range(100)]
        assert service.states(accepted) == {"queued"}
        own_redis.start()
        workers.wait_for(lambda: service.have_ended(accepted), timeout_s=90, what="for the rest")

    assert service.states(accepted) == {"succeeded"}
    assert {service.read(run_id).attempt for run_id in accepted} == {1}


def test_t_c5_messages_that_redis_forgets_are_rung_for_again(
    own_redis, settings_of, service_of, quick_tasks, workers, tmp_path
):
    settings = settings_of(broker_url=f"redis://127.0.0.1:{own_redis.port}/0")
    service = service_of(settings)
    log = tmp_path / "worker.log"
    with workers.worker(settings, "inference", log, include=quick_tasks):
        posted = []
        for number in range(30):
            posted.append(service.post(seconds=0.02))
            if number % 3 == 0:
                own_redis.flush()
        workers.wait_for(lambda: service.have_ended(posted), timeout_s=90, what="for all")

    assert service.states(posted) == {"succeeded"}


def test_t_c6_messages_that_come_five_times_and_shuffled_are_worked_on_once(
    own_redis, settings_of, service_of, quick_tasks, workers, tmp_path
):
    settings = settings_of(broker_url=f"redis://127.0.0.1:{own_redis.port}/0")
    service = service_of(settings)
    posted = [service.post(ring=False) for _ in range(40)]
    messages = posted * 5
    random.Random(1).shuffle(messages)
    for run_id in messages:
        assert celery_app.ring(run_id, "inference", settings=settings)
    with (
        workers.worker(settings, "inference", tmp_path / "1.log", include=quick_tasks),
        workers.worker(settings, "inference", tmp_path / "2.log", include=quick_tasks),
    ):
        workers.wait_for(lambda: service.have_ended(posted), timeout_s=90, what="for all")

    assert [service.outcomes(run_id) for run_id in posted] == [["done"]] * len(posted)


def test_t_c11_a_worker_whose_clock_is_two_hours_ahead_still_hears_the_bell(
    own_redis, settings_of, service_of, quick_tasks, workers, tmp_path, monkeypatch
):
    settings = settings_of(broker_url=f"redis://127.0.0.1:{own_redis.port}/0")
    app = celery_app.make_app(settings, sends=True)
    behind = datetime.now(UTC) - timedelta(hours=2)  # the sender's clock, seen from the worker
    monkeypatch.setattr(app, "now", lambda: behind)
    service = service_of(settings, upkeeps=False)  # nobody rings again
    with workers.worker(settings, "inference", tmp_path / "w.log", include=quick_tasks):
        heard = service.post()
        workers.wait_for(lambda: service.have_ended([heard]), timeout_s=90, what="for the run")

        monkeypatch.setattr(celery_app, "MESSAGE_LIFE_S", 600)  # the control: as it was before
        service.post()
        workers.wait_for(
            lambda: "Discarding revoked task" in (tmp_path / "w.log").read_text(),
            what="for the discarded message",
        )
    assert service.read(heard).state == db.RunState.SUCCEEDED
