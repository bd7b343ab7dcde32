"""The queue: Celery as a doorbell.

A message carries a run's id and nothing else; the run's row is the queue entry. So a message may be
lost, doubled or late without harm (`runs.claim`, `upkeep`), there is no result backend, and a task
is acknowledged when it starts: redelivery is never the way back, the lease is.

    inference   task service.infer, in service/tasks.py
    train       task trainer.train, in trainer/tasks.py (named by string: no import)
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError, OperationalError

from service import broker, faults
from service.settings import Settings, get_settings

logger = logging.getLogger(__name__)

TASK_OF = {"inference": "service.infer", "train": "trainer.train"}
MODULE_OF = {"inference": "service.tasks", "train": "trainer.tasks"}
KEY_PREFIX = "pcrl:"
WEEK_S = 7 * 86400
MESSAGE_LIFE_S = 86400
"""A doorbell older than this wakes nobody; upkeep has rung again by then. It is the worker's clock
that decides, against the sender's: with ten minutes, a worker whose clock is hours ahead took every
message for stale and never woke."""


POLL_S = 0.02
"""Pause between looks into the embedded broker's folder; half of it is a request's delay."""


ONE_MORE_TRY = {"max_retries": 1, "interval_start": 0.0, "interval_step": 0.0}
"""A request does not wait for a broker that refuses: kombu would try for six seconds."""

NO_LIMIT = 0
"""Of messages that wait for their acknowledgement. With one, the acknowledgement that a cut
connection swallowed (Celery logs it and goes on) left a worker deaf for good: it kept its only
place, and a worker without one does not even read the socket that tells of the cut. What holds a
worker back from messages beyond the one that it works on is `worker_disable_prefetch`."""


@lru_cache(maxsize=8)
def make_app(settings: Settings, *, sends: bool = False) -> Celery:
    """A Celery application for these settings: one that works, or one that only sends."""
    app = Celery("pcrl", set_as_current=False)
    app.conf.update(
        **_broker(settings),
        task_acks_late=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue="inference",
        task_routes={name: {"queue": queue} for queue, name in TASK_OF.items()},
        task_publish_retry=False,
        worker_enable_remote_control=False,  # who reaches the broker can wake a worker, no more
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    if sends:
        app.conf.broker_transport_options |= ONE_MORE_TRY
    return app


def __getattr__(name: str) -> Any:
    """`app`, for `celery -A service.celery_app`: made on first use, not when imported."""
    if name != "app":
        raise AttributeError(name)
    app = make_app(get_settings())
    app.set_current()
    return app


def ring(run_id: str, queue: str, *, settings: Settings | None = None) -> bool:
    """Wake a worker of a queue, after the run's row was committed.

    A broker that is down never fails a request: the row waits, and upkeep rings again.

    Returns:
        Whether the broker took the message.
    """
    app = make_app(settings or get_settings(), sends=True)
    faults.point("publish.before")
    try:
        app.send_task(TASK_OF[queue], [run_id], queue=queue, expires=MESSAGE_LIFE_S)
    except broker_errors() as error:
        logger.warning("the broker did not take %s: %s", run_id, type(error).__name__)
        return False
    faults.point("publish.after")
    return True


def broker_errors() -> tuple[type[Exception], ...]:
    """What talking to the broker may raise; to be asked when something was raised.

    Until then nobody needs to load redis, and with the embedded broker nobody ever does.
    """
    from redis.exceptions import RedisError

    return OperationalError, KombuError, RedisError, OSError


def worker_command(queue: str, *, settings: Settings | None = None) -> list[str]:
    """The command line of a worker for one queue (one process that works, one that listens)."""
    level = (settings or get_settings()).log_level
    return [
        *(sys.executable, "-m", "celery", "--app", "service.celery_app", "worker"),
        *("--queues", queue, "--include", MODULE_OF[queue], "--hostname", f"{queue}@%h"),
        *("--pool", "prefork", "--concurrency", "1", "--loglevel", level),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]


def _broker(settings: Settings) -> dict[str, Any]:
    if not settings.broker_url.startswith("filesystem:"):
        return {
            "broker_url": settings.broker_url,
            "worker_disable_prefetch": True,
            "worker_prefetch_multiplier": NO_LIMIT,
            "broker_transport_options": {
                "global_keyprefix": KEY_PREFIX,
                "visibility_timeout": WEEK_S,
                "socket_timeout": 30,
                "socket_connect_timeout": 2,
                "socket_keepalive": True,
                "health_check_interval": 25,
            },
        }
    folder = settings.data_dir / "broker"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "broker_url": f"{broker.SCHEME}://",
        "worker_prefetch_multiplier": 1,
        "broker_transport_options": {
            "data_folder_in": str(Path(folder)),
            "data_folder_out": str(Path(folder)),
            "polling_interval": POLL_S,
        },
    }
