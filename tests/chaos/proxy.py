"""A TCP proxy that delays, cuts and half-opens: everything that passes is asyncio in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Self


class Proxy:
    """Forwards to a port of this machine; a context manager.

    delay_s   every piece of data waits so long
    is_mute   connections stay open and nothing passes (half-open)
    cuts_at   what a client may not say: its connection is closed instead
    num_cuts  how often it was
    cut()     closes every connection
    """

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self.is_mute = False
        self.cuts_at: bytes | None = None
        self.num_cuts = 0
        self.port = 0
        self.num_connections = 0
        self._upstream = port
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def cut(self) -> int:
        """Close every connection; returns how many there were."""

        async def close() -> int:
            open_now = list(self._writers)
            for writer in open_now:
                writer.transport.abort()
            return len(open_now)

        return asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)

    def __enter__(self) -> Self:
        self._thread.start()

        async def listen() -> int:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            return int(self._server.sockets[0].getsockname()[1])

        self.port = asyncio.run_coroutine_threadsafe(listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            self._server.close()
            tasks = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.close()
            return
        ends = {writer, up_writer}
        self._writers |= ends
        try:
            await asyncio.gather(
                self._pump(reader, up_writer, listens=True), self._pump(up_reader, writer)
            )
        finally:
            self._writers -= ends
            for end in ends:
                end.close()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, listens: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if listens and self.cuts_at is not None and self.cuts_at in data:
                    self.num_cuts += 1
                    break
                await asyncio.sleep(self.delay_s)
                while self.is_mute:
                    await asyncio.sleep(0.05)
                target.write(data)
                await target.drain()
        target.close()
