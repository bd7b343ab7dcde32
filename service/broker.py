"""The embedded broker: Celery's file-system transport with its races closed.

kombu's own transport opens a message's file under its final name before it writes it, moves taken
files to the system's temporary folder (perhaps by copying), and rewrites a shared routing table in
place, so that processes that start together may read half a file. Here a message appears and is
taken by rename inside one folder, and there is no table: our tasks go to their queue directly.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any, cast

from kombu.transport import TRANSPORT_ALIASES, filesystem, virtual

SCHEME = "pcrl-folder"
TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"


class Channel(filesystem.Channel):
    """Messages as files `<nanoseconds>_<uuid>.<queue>.msg` in `data_folder_in`."""

    supports_fanout = False

    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]
        folder = Path(self.data_folder_out)
        name = f"{time.time_ns():020d}_{uuid.uuid4().hex}"
        draft = folder / f"{name}.draft"
        draft.write_text(json.dumps(payload), encoding="utf-8")
        draft.rename(folder / f"{name}.{queue}.msg")

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        folder = Path(self.data_folder_in)
        for waiting in sorted(folder.glob(f"*.{queue}.msg")):
            taken = waiting.with_suffix(f".taken-{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):  # another worker was first
                waiting.rename(taken)
                payload = json.loads(taken.read_text(encoding="utf-8"))
                taken.unlink()
                return cast("dict[str, Any]", payload)
        raise Empty

    def get_table(self, exchange: str) -> Any:
        """Bindings of this process alone."""
        return virtual.Channel.get_table(self, exchange)  # type: ignore[no-untyped-call]


class Transport(filesystem.Transport):
    """The transport behind `pcrl-folder://`."""

    Channel = Channel
    implements = filesystem.Transport.implements.extend(exchange_type=frozenset(["direct"]))
    global_state = virtual.BrokerState()  # type: ignore[no-untyped-call]
