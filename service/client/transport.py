"""One service and one token: how requests are sent, sent again, and files saved."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from service import schemas
from service.answers import ApiError, check, unreachable

CHUNK_BYTES = 1 << 20
NUM_TRIES = 4
STREAM_TIMEOUT_S = 45.0
"""Three times the pause between a stream's pings."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

Shown = TypeVar("Shown", bound=BaseModel)


class Transport:
    """How the service is reached; safe to use from several threads."""

    def __init__(
        self, base_url: str, token: str, *, project: str | None = None, timeout_s: float = 60.0
    ) -> None:
        """Nothing is sent yet; `project` (id or name) is for tokens of all projects."""
        url = httpx.URL(base_url)
        self._timeout_s = timeout_s
        self._patient = httpx.Timeout(timeout_s, read=None)  # reading a scan, loading a model
        self._http = httpx.Client(
            base_url=url.copy_with(path=url.path.rstrip("/") + "/api/v1/"),
            headers={
                "Authorization": f"Bearer {token}",
                **({"PCRL-Project": project} if project else {}),
            },
            timeout=timeout_s,
            trust_env=url.host not in LOOPBACK,  # no proxy on the way to this machine
        )

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def capabilities(self) -> schemas.Capabilities:
        """What the service can do, and the token's role."""
        return self._get("capabilities", schemas.Capabilities)

    def _get(self, path: str, shape: type[Shown], params: Mapping[str, str] | None = None) -> Shown:
        return shape.model_validate_json(self._again("GET", path, params=params).content)

    def _pages(
        self, path: str, shape: type[schemas.Page[Any]], filters: Mapping[str, str]
    ) -> Iterator[Any]:
        params = dict(filters)
        while True:
            page = self._get(path, shape, params)
            yield from page.items
            if page.next_page_token is None:
                return
            params["page_token"] = page.next_page_token

    def _create(self, path: str, body: Mapping[str, Any], shape: type[Shown]) -> Shown:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        answer = self._again("POST", path, json=body, headers=headers)
        return shape.model_validate_json(answer.content)

    def _again(self, method: str, path: str, **how: Any) -> httpx.Response:
        """Send what may be sent twice; try again when nothing, or nobody, answers."""
        for number in range(NUM_TRIES):
            try:
                return self._once(method, path, **how)
            except ApiError as error:
                if not error.is_transient or number == NUM_TRIES - 1:
                    raise
                time.sleep(0.25 * 2**number)
        raise AssertionError("unreachable: the last try returns or raises")

    def _send(
        self,
        route: str,
        path: Path,
        *,
        params: Mapping[str, str],
        on_progress: Callable[[int], None] | None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a file that may be sent twice as the body; again from its start after a break."""
        described_as = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(path.stat().st_size),
        }
        for number in range(NUM_TRIES):
            try:
                return self._once(
                    "POST",
                    route,
                    params=params,
                    content=_chunks(path, on_progress),
                    headers={**described_as, **(headers or {})},
                    timeout=self._patient,
                )
            except ApiError as error:
                if not error.is_transient or number == NUM_TRIES - 1:
                    raise
                time.sleep(0.25 * 2**number)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, method: str, path: str, **how: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **how)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        check(answer)
        return answer

    def _listen(
        self, path: str, after: int, *, read_s: float = STREAM_TIMEOUT_S
    ) -> Iterator[tuple[str, int, str]]:
        """Server-sent events after `after`, as (event, id, data), until the service ends them.

        Raises:
            ApiError: Nothing came for `read_s`, the connection broke, or it was refused.
        """
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(self._timeout_s, read=read_s)
        name, number = "", after
        try:
            with self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
                if answer.is_error:
                    answer.read()
                check(answer)
                for line in answer.iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "event":
                        name = value
                    elif field == "id":
                        number = int(value)
                    elif field == "data":
                        yield name, number, value
        except httpx.TransportError as error:
            raise unreachable(error) from error

    def _download(self, path: str, target: Path) -> None:
        """Save an answer; a file that broke off never gets its final name."""
        draft = target.with_name(f".{target.name}.part")
        try:
            with self._http.stream("GET", path) as answer:
                if answer.is_error:
                    answer.read()
                check(answer)
                with draft.open("wb") as file:
                    for chunk in answer.iter_bytes(CHUNK_BYTES):
                        file.write(chunk)
            draft.replace(target)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        finally:
            draft.unlink(missing_ok=True)


def _chunks(path: Path, on_progress: Callable[[int], None] | None) -> Iterator[bytes]:
    sent = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            sent += len(chunk)
            if on_progress is not None:
                on_progress(sent)
