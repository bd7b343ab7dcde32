"""Poison, cancel and SIGTERM, on real processes."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import pytest

from benchmarks.chaos import load
from benchmarks.real_api import RealApi

pytestmark = pytest.mark.slow


@pytest.mark.timeout(200)
def test_t_c8_a_poison_job_is_tried_three_times_and_others_are_worked_on_in_between(
    settings_of, service_of, quick_tasks, workers, tmp_path
):
    settings = settings_of(lease_s=2.0, heartbeat_s=0.2)
    service = service_of(settings)
    poison = service.post(poison=True)
    others = [service.post() for _ in range(5)]
    with workers.worker(settings, "inference", tmp_path / "w.log", include=quick_tasks):
        workers.wait_for(lambda: service.have_ended([poison, *others]), timeout_s=160)

    run = service.read(poison)
    assert (run.state, run.error["code"], run.attempt) == ("failed", "worker_lost", 3)
    assert service.outcomes(poison) == ["lost"] * 3
    assert service.states(others) == {"succeeded"}
    assert all(service.read(run_id).finished_at < run.finished_at for run_id in others)


def test_t_c10_a_run_that_is_worked_on_stops_with_a_heartbeat(
    settings_of, service_of, quick_tasks, workers, tmp_path
):
    from service import runs

    settings = settings_of()
    service = service_of(settings)
    with workers.worker(settings, "inference", tmp_path / "w.log", include=quick_tasks):
        run_id = service.post(seconds=60.0)
        workers.wait_for(lambda: service.read(run_id).state == "running", timeout_s=90)
        with service.sessions() as session:
            runs.request_cancel(session, run_id)
            session.commit()
        workers.wait_for(lambda: service.have_ended([run_id]), timeout_s=20)

    assert service.read(run_id).state == "canceled"
    assert service.outcomes(run_id) == ["canceled"]


def test_t_c13_an_inference_worker_that_is_asked_to_stop_gives_its_run_back(
    settings_of, service_of, quick_tasks, workers, tmp_path
):
    settings = settings_of()
    service = service_of(settings)
    with workers.worker(settings, "inference", tmp_path / "w.log", include=quick_tasks) as process:
        run_id = service.post(seconds=60.0)
        workers.wait_for(lambda: service.read(run_id).state == "running", timeout_s=90)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(40)

    assert (service.read(run_id).state, service.read(run_id).attempt) == ("interrupted", 0)
    assert service.outcomes(run_id) == ["preempted"]


@pytest.mark.timeout(240)
def test_t_c13_uploads_end_or_can_be_sent_again_when_the_api_is_asked_to_stop(tmp_path):
    answers: dict[int, int] = {}

    def upload(api: RealApi, number: int) -> None:
        try:
            answer = httpx.post(
                f"{api.url}/api/v1/volumes",
                params={"subject": f"s{number}"},
                content=load.file_of(number),
                headers={
                    "Authorization": f"Bearer {api.token}",
                    "Content-Type": "application/octet-stream",
                },
                timeout=120.0,
                trust_env=False,
            )
            answers[number] = answer.status_code
        except httpx.TransportError:
            answers[number] = 0

    def upload_all(api: RealApi) -> list[threading.Thread]:
        threads = [threading.Thread(target=upload, args=(api, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        return threads

    with RealApi(tmp_path / "data", readers=2) as api:
        threads = upload_all(api)
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(api.pid, signal.SIGTERM)
        assert api.wait(60.0) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 60.0
        for thread in threads:
            thread.join()
        first = dict(answers)
        api.start(timeout_s=100.0)
        for thread in upload_all(api):
            thread.join()
        headers = {"Authorization": f"Bearer {api.token}"}
        listed = httpx.get(f"{api.url}/api/v1/volumes", headers=headers, trust_env=False).json()

    assert set(first.values()) <= {0, 201, 503}
    assert set(answers.values()) <= {200, 201}
    assert sorted(one["subject"] for one in listed["items"]) == sorted(f"s{n}" for n in range(8))
