"""What the service costs around the network, on a real stack.

`python -m benchmarks.bench_serving --json`: the embedded stack (`pcrl up`) with random weights in
networks of `--width`, one segmenter of 96x96x64 windows and one encoder of 64x64x32 patches, and
volumes of one window each. `--smoke` is small and quick.

    segment.overhead     of a warm `POST /segmentations` with `Prefer: wait`: 1 - network / total;
                         network is the run's own `infer`, total what the client waits
    embed.vs_bare        embeddings a second from 1 to 8 clients, over those of a bare session
                         that runs one patch after another, with as many threads; the mean of
                         its times just before and just after, as the machine's speed drifts
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import torch

from imaging import nifti
from models import bundle
from models.bundle import Lineage, Manifest, TensorSpec
from models.networks.unet3d import UNet3d as Network
from models.networks.unet3d import fold
from models.recipe import FinetuneRecipe, Preprocessing, PretrainRecipe, UNet3d, Window
from models.session import open_session
from service import auth, db, registry
from service.settings import Settings
from service.stack import Stack
from service.storage import Store
from trainer.export import PooledEncoder, to_onnx

SPEC = Preprocessing(spacing_mm=(1.0, 1.0, 1.0), intensity=Window(low_hu=0.0, high_hu=1000.0))
Size = tuple[int, int, int]


def make_bundle(folder: Path, kind: str, width: int, patch: Size) -> Path:
    """A bundle with random weights, as the exporter would write it but without parity."""
    torch.manual_seed(0)
    network = Network(1, 3, base_width=width, norm="batch").eval()
    is_encoder = kind == "encoder"
    spatial = tuple(f"8*{axis}8" for axis in "ijk")
    output = (
        TensorSpec(name="embedding", shape=("batch", 16 * width))
        if is_encoder
        else TensorSpec(name="logits", shape=("batch", 3, *spatial))
    )
    manifest = Manifest(
        kind="encoder" if is_encoder else "segmenter",
        labels=() if is_encoder else ("liver", "tumour"),
        inputs=(TensorSpec(name="image", shape=("batch", 1, *spatial)),),
        outputs=(output,),
        preprocessing=SPEC,
        patch_size=patch,
        recipe=PretrainRecipe(network=UNet3d(base_width=width))
        if is_encoder
        else FinetuneRecipe(
            labels={"liver": 1, "tumour": 2}, network=UNet3d(base_width=width), patch_size=patch
        ),
        lineage=Lineage(
            dataset_digest="0" * 64, seed=0, num_steps=0, code_version="benchmark", torch_version=""
        ),
        parity=(),
        created_at=datetime.now(UTC),
    )
    model = folder / f"{kind}.onnx"
    served = PooledEncoder(network.encoder) if is_encoder else fold(network)
    to_onnx(served, model, manifest, bundle.onnx_metadata(manifest))
    bundle.save(folder / kind, manifest, {bundle.MODEL: model}, "# Random weights\n")
    return folder / kind


def bare_s(folder: Path, patch: Size, threads: int, rounds: int) -> float:
    """Median seconds of one patch in a bare session, one after another."""
    session = open_session(folder, num_threads=threads)
    image = np.random.default_rng(0).random((1, 1, *patch), dtype=np.float32)
    session.run(image)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        session.run(image)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def post(client: httpx.Client, route: str, volume: str, model: str) -> dict[str, object]:
    """Ask, wait, and return the run's result."""
    answer = client.post(
        route, json={"volume_id": volume, "model": model}, headers={"Prefer": "wait=60"}
    )
    answer.raise_for_status()
    found: dict[str, object] = answer.json()
    assert found["state"] == "succeeded", found
    return found


def segment(client: httpx.Client, volume: str, rounds: int) -> dict[str, object]:
    """Overhead of warm segmentations of one window."""
    shares, totals, stages = [], [], []
    for number in range(rounds + 1):
        start = time.perf_counter()
        found = post(client, "/segmentations", volume, "segmenter@live")
        total = time.perf_counter() - start
        timings = dict(found["result"]["timings_s"])  # type: ignore[index]
        if number == 0:
            continue  # the network has run, but not the writers of results
        shares.append(1.0 - timings["infer"] / total)
        totals.append(total)
        stages.append({**timings, "outside_worker": total - timings["total"]})
    names = stages[0]
    return {
        "overhead": round(statistics.median(shares), 4),
        "overhead_by_round": [round(share, 3) for share in shares],
        "total_s": round(statistics.median(totals), 4),
        "stages_s": {
            name: round(statistics.median(stage[name] for stage in stages), 4) for name in names
        },
    }


def embed_rate(url: str, token: str, volumes: list[str], clients: int, number: int) -> float:
    """Embeddings a second that this many clients get, each asking again when it is answered."""

    def ask(which: int) -> None:
        with _client(url, token) as client:
            for turn in range(number // clients):
                post(client, "/embeddings", volumes[(which + turn) % len(volumes)], "encoder@live")

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    return (number // clients) * clients / (time.perf_counter() - start)


def measure(folder: Path, *, width: int, threads: int, rounds: int, is_smoke: bool) -> object:
    """Start the stack, measure, stop it."""
    window: Size = (32, 32, 16) if is_smoke else (96, 96, 64)
    patch: Size = (16, 16, 16) if is_smoke else (64, 64, 32)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    settings = Settings(
        data_dir=folder / "data",
        port=port,
        device="cpu",
        inference_threads=threads,
        min_free_bytes=0,
        embed_threads=8,
    )
    made = {
        kind: make_bundle(folder, kind, width, size)
        for kind, size in (("segmenter", window), ("encoder", patch))
    }
    with contextlib.ExitStack() as last:
        stack = Stack(settings)
        last.callback(stack.stop)
        stack.start(timeout_s=300.0)
        engine = db.connect(settings.database_url)
        with db.sessions(engine)() as session:
            _, token = auth.create_token(session, "bench", auth.Role.ADMIN)
            for kind, path in made.items():
                digest = Store(settings.data_dir).publish_bundle(path)
                manifest = bundle.load(path).model_dump(mode="json")
                registry.register(session, kind, kind=kind, digest=digest, manifest=manifest)
            session.commit()
        engine.dispose()
        with _client(stack.url, token) as client:
            start = time.perf_counter()
            for kind in made:
                move = {"version": 1, "override_reason": "random weights, no card: a benchmark"}
                client.put(f"/models/{kind}/aliases/live", json=move).raise_for_status()
            moved_s = time.perf_counter() - start
            scans = {size: _upload(client, folder, size, 2) for size in (window, patch)}
            segmented = segment(client, scans[window][0], rounds)
            print(f"segmentation: {segmented}", file=sys.stderr, flush=True)
            embed_rate(stack.url, token, scans[patch], 8, 8)  # so that batches of 8 have run
            rates, bares = {}, [bare_s(made["encoder"], patch, threads, rounds)]
            for clients in (1, 2, 4, 8):
                rate = embed_rate(stack.url, token, scans[patch], clients, 4 * rounds + 8)
                bares.append(bare_s(made["encoder"], patch, threads, rounds))
                rates[clients] = rate * statistics.mean(bares[-2:])
    return {
        "width": width,
        "threads": threads,
        "window": window,
        "patch": patch,
        "aliases_moved_s": round(moved_s, 2),
        "segment": segmented,
        "embed": {
            "bare_s": [round(bare, 4) for bare in bares],
            "vs_bare": {clients: round(share, 3) for clients, share in rates.items()},
        },
    }


def _upload(client: httpx.Client, folder: Path, size: Size, count: int) -> list[str]:
    found, random = [], np.random.default_rng(0)
    for number in range(count):
        path = folder / "scan.nii"
        voxels = random.integers(100, 1000, size=size).astype(np.int16)
        nifti.write(path, voxels, np.eye(4))
        answer = client.post(
            "/volumes",
            params={"subject": f"s{number}"},
            content=path.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )
        answer.raise_for_status()
        found.append(str(answer.json()["id"]))
    return found


def _client(url: str, token: str) -> httpx.Client:
    return httpx.Client(
        base_url=f"{url}/api/v1",
        headers={"Authorization": f"Bearer {token}"},
        timeout=120.0,
        trust_env=False,
    )


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    parser.add_argument("--json", action="store_true", help="the default; for `make bench`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Path(folder),
            width=4 if options.smoke else options.width,
            threads=options.threads,
            rounds=2 if options.smoke else options.rounds,
            is_smoke=options.smoke,
        )
    json.dump(result, sys.stdout)
    print(flush=True)


if __name__ == "__main__":
    main()
