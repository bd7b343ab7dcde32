"""T-D4, T-L3, T-H1 through a real API process: killed, measured, and given bombs."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import hostile
from benchmarks.real_api import Growth, RealApi, processor_s
from imaging import nifti
from service.cli import app
from service.client import ApiError, Client
from service.client import scans as client_module
from service.uploads import CHUNK_BYTES

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


class Proxy:
    """TCP in between: counts what the client sends, and tells at a number of bytes."""

    def __init__(self, port: int) -> None:
        self.num_bytes = 0
        self.at: int | None = None
        self.reached = threading.Event()
        self._upstream = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        address = ("127.0.0.1", self._upstream)
        with client, contextlib.suppress(OSError), socket.create_connection(address) as api:
            back = threading.Thread(target=self._pump, args=(api, client), daemon=True)
            back.start()
            self._pump(client, api, counted=True)
            back.join(5)

    def _pump(self, source: socket.socket, target: socket.socket, *, counted: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    with self._lock:
                        self.num_bytes += len(data)
                        if self.at is not None and self.num_bytes >= self.at:
                            self.at = None
                            self.reached.set()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def scan(tmp_path, request) -> Path:
    """40 MiB: five pieces, no two of them alike, and unlike what other tests have sent."""
    path = tmp_path / "scan.nii"
    random = np.random.default_rng(len(request.node.name))
    voxels = np.tile(random.integers(-500, 500, (64, 64, 1), np.int16), (4, 4, 320))
    voxels += np.arange(320, dtype=np.int16)
    nifti.write(path, voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[RealApi]:
    with RealApi(tmp_path_factory.mktemp("served") / "data") as served:
        yield served


@pytest.fixture
def api(served) -> RealApi:
    """A running API; the tests of this module share it, and bring it back when they kill it."""
    try:
        httpx.get(f"{served.url}/healthz", trust_env=False)
    except httpx.TransportError:
        served.start()
    return served


# --- memory, of a process that is young


@pytest.mark.slow
def test_t_l3_the_memory_of_the_api_does_not_grow_with_what_is_sent(api, tmp_path):
    grown = {}
    with Client(api.url, api.token) as client:
        for number, way in enumerate((client.upload_whole, client.upload)):
            path = tmp_path / f"{number}.nii"
            voxels = np.zeros((512, 512, 192), np.int16)  # 96 MiB
            voxels[:9, :9, :9] = number + 1
            nifti.write(path, voxels, np.eye(4))
            watched = Growth(api.pid)
            volume = way(path)
            grown[way.__name__] = watched.mib
            assert volume.size_bytes > 96 * MIB
            path.unlink()

    print(grown)
    assert max(grown.values()) < 24, grown  # 5 MiB on quiet cores


def test_the_measure_sees_memory_that_was_given_back():
    script = (
        "import sys; input(); held = bytearray(100 << 20); del held; print(1, flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        time.sleep(0.3)
        watched = Growth(child.pid)
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
        grown = watched.mib
        child.stdin.write(b"\n")

    assert grown > 90


DEAR = "gzip of 200,000 members"
"""It takes a reader 1.7 s."""
assert DEAR in hostile.BOMBS


@pytest.mark.parametrize("name", sorted(hostile.BOMBS))
def test_t_h1_bombs_end_soon_with_a_4xx_and_cost_the_api_no_memory(api, tmp_path, name):
    """In processor time, which neighbours on the machine do not change; alone, by the clock too."""
    path = tmp_path / "upload"
    path.write_bytes(hostile.BOMBS[name]())
    with Client(api.url, api.token) as client:
        kept = client.volumes()
        watched, start, spent = Growth(api.pid), time.perf_counter(), processor_s(api.pid)
        with pytest.raises(ApiError) as caught:
            client.upload_whole(path)
        wall_s = time.perf_counter() - start
        cpu_s = processor_s(api.pid) - spent
        assert client.volumes() == kept

    print(
        f"{name}: {caught.value.status} {caught.value.code}, {wall_s:.1f} s, "
        f"processor {cpu_s:.1f} s, memory +{watched.mib:.1f} MiB"
    )
    assert caught.value.status in (413, 422)
    assert cpu_s < 10  # 4 s at most on quiet cores
    assert name != DEAR or cpu_s > 0.5  # the control: what a reader takes is seen
    assert wall_s < 30
    assert watched.mib < 64


# --- broken connections


def upload_through_kills(api: RealApi, send, proxy: Proxy, kills: list[int]) -> int:
    """Send while the API is killed whenever so many more bytes came; returns how many kills hit."""
    hit = 0
    done = threading.Event()

    def killer() -> None:
        nonlocal hit
        for more in kills:
            proxy.reached.clear()
            proxy.at = proxy.num_bytes + more
            while not proxy.reached.wait(0.05):
                if done.is_set():
                    return
            api.kill()
            hit += 1
            api.start()

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        send()
    finally:
        done.set()
        thread.join(60)
    return hit


@pytest.mark.slow
def test_t_d4_an_api_killed_in_the_middle_costs_one_piece(api, scan, monkeypatch):
    size = scan.stat().st_size
    proxy = Proxy(api.port)
    seen: list[int] = []
    kills = [int(n) for n in np.random.default_rng(4).integers(9 * MIB, 15 * MIB, 2)]
    print("kills after", kills)
    with Client(f"http://127.0.0.1:{proxy.port}", api.token) as client:
        volumes = []

        def send() -> None:
            volumes.append(client.upload(scan, on_progress=seen.append))

        hit = upload_through_kills(api, send, proxy, kills)
        volume = volumes[0]

    assert hit == 2
    assert volume.sha256 == hashlib.sha256(scan.read_bytes()).hexdigest()
    assert volume.shape == (256, 256, 320)
    assert seen == sorted(seen)
    assert seen[-1] == size
    sent_again = proxy.num_bytes - size
    print("sent again", sent_again, "bytes after", hit, "kills")
    assert 0 < sent_again <= hit * (CHUNK_BYTES + 64 * 1024)
    proxy.close()


@pytest.mark.slow
def test_the_count_sees_a_client_that_begins_anew(api, scan):
    """The negative control: the same kill, and the file in one body."""
    proxy = Proxy(api.port)
    with Client(f"http://127.0.0.1:{proxy.port}", api.token) as client:

        def send() -> None:
            for _ in range(60):  # until the API is back, on loaded cores too
                with contextlib.suppress(ApiError):
                    client.upload_whole(scan)
                    return
                time.sleep(1.0)

        hit = upload_through_kills(api, send, proxy, [20 * MIB])

    assert hit == 1
    assert proxy.num_bytes - scan.stat().st_size > CHUNK_BYTES + 64 * 1024
    proxy.close()


def test_a_client_that_was_killed_goes_on_where_it_was(api, scan, monkeypatch):
    progress: list[int] = []

    class Killed(BaseException):
        pass

    def stop(sent: int) -> None:
        if sent >= 2 * CHUNK_BYTES:
            raise Killed

    with Client(api.url, api.token) as client, pytest.raises(Killed):
        client.upload(scan, on_progress=stop)
    with Client(api.url, api.token) as client:
        volume = client.upload(scan, on_progress=progress.append)

    assert progress[0] == 2 * CHUNK_BYTES
    assert volume.size_bytes == progress[-1] == scan.stat().st_size


def test_the_command_line_sends_in_pieces_and_prints_the_id(api, scan, monkeypatch):
    monkeypatch.setenv("PCRL_URL", api.url)
    monkeypatch.setenv("PCRL_TOKEN", api.token)
    before = (api.settings.data_dir / "api.log").read_text()

    result = CliRunner().invoke(app, ["upload", str(scan), "--subject", "by-command"])

    assert result.exit_code == 0, result.output
    log = (api.settings.data_dir / "api.log").read_text()[len(before) :]
    assert log.count("PUT /api/v1/uploads/") == -(-scan.stat().st_size // CHUNK_BYTES)
    with Client(api.url, api.token) as client:
        assert result.stdout.strip() == client.volumes(subject="by-command")[0].id


def test_a_service_that_stays_away_is_said_to_be_unreachable(api, scan, monkeypatch):
    monkeypatch.setattr(client_module, "PATIENCE_S", 1.0)
    api.kill()

    with Client(api.url, api.token) as client, pytest.raises(ApiError, match="unreachable"):
        client.upload(scan)
