"""T-C12: slow, cut and half-open connections to PostgreSQL and Redis."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
from sqlalchemy import make_url

pytestmark = [pytest.mark.services, pytest.mark.slow]

_spec = importlib.util.spec_from_file_location("proxy", Path(__file__).with_name("proxy.py"))
proxies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(proxies)


@pytest.mark.timeout(240)
def test_t_c12_runs_end_through_a_network_that_delays_cuts_and_half_opens(
    own_redis, postgres_url, settings_of, service_of, quick_tasks, workers, tmp_path
):
    url = make_url(postgres_url)
    near = settings_of(
        database_url=postgres_url, broker_url=f"redis://127.0.0.1:{own_redis.port}/0"
    )
    service = service_of(near)
    with proxies.Proxy(url.port or 5432) as postgres, proxies.Proxy(own_redis.port) as broker:
        through = url.set(host="127.0.0.1", port=postgres.port)
        far = near.model_copy(
            update={
                "database_url": through.render_as_string(hide_password=False),
                "broker_url": f"redis://127.0.0.1:{broker.port}/0",
            }
        )
        with workers.worker(far, "inference", tmp_path / "w.log", include=quick_tasks):
            posted = [service.post() for _ in range(5)]
            workers.wait_for(lambda: service.have_ended(posted), timeout_s=90, what="before")

            postgres.delay_s = broker.delay_s = 0.05
            num_cut = 0
            for _ in range(6):
                posted += [service.post(seconds=0.1) for _ in range(2)]
                time.sleep(0.5)
                num_cut += postgres.cut() + broker.cut()
            assert num_cut > 0  # cuts that hit nothing prove nothing
            postgres.is_mute = broker.is_mute = True  # half-open for longer than the lease
            posted += [service.post() for _ in range(3)]
            time.sleep(near.lease_s + 2.0)
            postgres.cut()
            broker.cut()
            postgres.is_mute = broker.is_mute = False
            postgres.delay_s = broker.delay_s = 0.0
            workers.wait_for(lambda: service.have_ended(posted), timeout_s=90, what="all")
            assert postgres.num_connections > 1

    states = [service.read(run_id).state for run_id in posted]
    assert states == ["succeeded"] * len(posted)
    assert all(service.outcomes(run_id).count("done") == 1 for run_id in posted)


@pytest.mark.parametrize(
    ("options", "hears"), [([], True), (["--prefetch-multiplier", "1"], False)]
)
def test_a_worker_whose_acknowledgement_a_cut_swallowed_hears_the_next_bell(
    options, hears, own_redis, postgres_url, settings_of, service_of, quick_tasks, workers, tmp_path
):
    near = settings_of(
        database_url=postgres_url, broker_url=f"redis://127.0.0.1:{own_redis.port}/0"
    )
    service = service_of(near)
    log = tmp_path / "w.log"
    with proxies.Proxy(own_redis.port) as broker:
        far = near.model_copy(update={"broker_url": f"redis://127.0.0.1:{broker.port}/0"})
        with workers.worker(far, "inference", log, include=quick_tasks, options=options):
            workers.wait_for(lambda: "ready" in log.read_text(), what="for the worker")
            broker.cuts_at = b"ZREM"  # how kombu takes a message from those not acknowledged
            first = service.post(seconds=0.5)
            workers.wait_for(lambda: service.have_ended([first]), what="for the first")
            workers.wait_for(lambda: "succeeded in" in log.read_text(), what="for its task's end")
            assert "Couldn't ack" in log.read_text()
            broker.cuts_at = None
            assert broker.num_cuts > 0

            second = service.post()
            until = time.monotonic() + (40.0 if hears else 8.0)
            while not service.have_ended([second]) and time.monotonic() < until:
                time.sleep(0.05)
            assert service.have_ended([second]) is hears
