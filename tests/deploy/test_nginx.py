"""The proxy's configuration, in a real nginx where one is installed.

Debian's nginx-light is enough; without it these tests are skipped, for nothing else needs it.
"""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.settings import Settings

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx binary (Debian: nginx-light)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def lay_out(root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Puts the files where the container has them, with local ports and paths."""

    def write(server: str, replace: dict[str, str]) -> Path:
        (tmp_path / "pcrl").mkdir(exist_ok=True)
        for source, target in (
            ("nginx.conf", "nginx.conf"),
            (server, "pcrl/server.conf"),
            ("nginx-locations.conf", "pcrl/locations.conf"),
        ):
            text = (root / "docker" / source).read_text()
            for old, new in {"/tmp/": f"{tmp_path}/", **replace}.items():
                text = text.replace(old, new)
            (tmp_path / target).write_text(text)
        return tmp_path / "nginx.conf"

    return write


def test_the_proxy_lets_through_what_the_api_accepts(root: Path) -> None:
    text = (root / "docker/nginx-locations.conf").read_text()

    found = re.search(r"client_max_body_size (\d+)g;", text)

    assert found
    assert int(found[1]) * 1024**3 == Settings.model_fields["max_upload_bytes"].default


@needs_nginx
@pytest.mark.parametrize("server", ["nginx-http.conf", "nginx-tls.conf"])
def test_nginx_accepts_the_configuration(
    lay_out: Callable[..., Path], tmp_path: Path, server: str
) -> None:
    key, certificate = tmp_path / "tls_key", tmp_path / "tls_certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    good = lay_out(server, {"/run/secrets/": f"{tmp_path}/"})

    checked = subprocess.run([str(NGINX), "-t", "-c", good], capture_output=True, text=True)

    assert checked.returncode == 0, checked.stderr
    assert "syntax is ok" in checked.stderr
    bad = lay_out(server, {"/run/secrets/": f"{tmp_path}/", "proxy_read_timeout": "proxy_patience"})
    assert subprocess.run([str(NGINX), "-t", "-c", bad], capture_output=True).returncode != 0


class Api(BaseHTTPRequestHandler):
    """Stands behind the proxy and tells when the first bytes of a body arrive."""

    protocol_version = "HTTP/1.1"
    first_bytes = threading.Event()
    go_on = threading.Event()

    def do_GET(self) -> None:
        self.close_connection = True  # a stale Content-Length's body is never read
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"data: one\n\n")
        self.wfile.flush()
        if self.path.startswith("/events"):
            self.go_on.wait(10)

    def do_POST(self) -> None:
        num_bytes = int(self.headers["Content-Length"])
        num_bytes -= len(self.rfile.read(10))
        self.first_bytes.set()
        self.rfile.read(num_bytes)
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def api() -> Iterator[int]:
    Api.first_bytes.clear()
    Api.go_on.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    Api.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def start(lay_out: Callable[..., Path], tmp_path: Path, api: int) -> Iterator[Callable[..., int]]:
    """Starts the proxy before the stand-in and returns its port."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(replace: dict[str, str] | None = None) -> int:
        port = free_port()
        local = {
            "http://api:8000": f"http://127.0.0.1:{api}",
            "listen 8080": f"listen 127.0.0.1:{port}",
            "127.0.0.1:8081": f"127.0.0.1:{free_port()}",
            "/dev/stdout": str(tmp_path / "access.log"),
        }
        config = lay_out("nginx-http.conf", {**local, **(replace or {})})
        processes.append(
            subprocess.Popen(
                [str(NGINX), "-c", config, "-g", "daemon off;"], stderr=subprocess.DEVNULL
            )
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return port
            except OSError:
                assert time.monotonic() < deadline, "nginx did not start"
                time.sleep(0.05)

    yield run
    for process in processes:
        process.terminate()
        process.wait(10)


def stale_get(port: int) -> bytes:
    """A GET that announces a body which never comes; its answer's first line."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
        client.sendall(b"GET /info HTTP/1.1\r\nHost: x\r\nContent-Length: 78\r\n\r\n")
        return client.recv(4096).split(b"\r\n")[0]


@needs_nginx
def test_an_upload_reaches_the_api_before_it_is_complete(start: Callable[..., int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", start(), timeout=10)
    connection.putrequest("POST", "/api/v1/volumes?subject=canary-4711")
    connection.putheader("Content-Length", "20")
    connection.endheaders()

    connection.send(b"0123456789")

    assert Api.first_bytes.wait(5)
    connection.send(b"0123456789")
    assert connection.getresponse().status == 201
    connection.close()


@needs_nginx
def test_a_get_with_a_stale_content_length_is_answered(start: Callable[..., int]) -> None:
    assert stale_get(start()).endswith(b"200 OK")

    # The control: with nginx's default it waits for the body (protocols.md, 2.1, trap 1).
    with pytest.raises(TimeoutError):
        stale_get(start({"proxy_request_buffering off;": ""}))


@needs_nginx
def test_an_event_passes_while_the_stream_is_open(start: Callable[..., int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", start(), timeout=5)
    connection.request("GET", "/events")

    first = connection.getresponse().readline()

    assert first == b"data: one\n"
    assert not Api.go_on.is_set()
    connection.close()


@needs_nginx
def test_a_body_beyond_the_limit_is_refused_unread(start: Callable[..., int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", start(), timeout=5)
    connection.putrequest("POST", "/api/v1/volumes")
    connection.putheader("Content-Length", str(8 * 1024**3 + 1))
    connection.endheaders()

    assert connection.getresponse().status == 413
    assert not Api.first_bytes.is_set()
    connection.close()


@needs_nginx
def test_the_access_log_holds_the_path_and_no_query(
    start: Callable[..., int], tmp_path: Path
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", start(), timeout=5)
    connection.request("GET", "/api/v1/volumes?subject=canary-4711")
    connection.getresponse().read()
    connection.close()

    deadline = time.monotonic() + 5
    while "/api/v1/volumes" not in (log := (tmp_path / "access.log").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "canary-4711" not in log
