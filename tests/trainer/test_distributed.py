"""Two processes (gloo, CPU) train as one process with the joined batch; how a run of several ends.

Tolerance: the ranks add in another order, which rounds otherwise: losses agree to 1e-5 relative,
weights and queue to 1e-5. A piece of the joining left out is off by at least ten times that.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.recipe import PretrainRecipe
from trainer import checkpoint, distributed, errors, launch, pretrain
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.scans import discover
from trainer.joined_norm import JoinedBatchNorm, join
from trainer.methods.pcrl import Pcrl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TOLERANCE = 1e-5
STEPS = 4


@pytest.fixture(scope="module")
def small() -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "network": {"base_width": 2},
            "preprocessing": {"spacing_mm": [2, 2, 2]},
            "crops": {"input_size": [16, 16, 16], "crop_sizes": [[16, 16, 16], [24, 24, 16]]},
            "method": {"embedding_size": 8, "queue_size": 40},
            "num_steps": STEPS,
            "batch_size": 4,
            "learning_rate": 0.05,
            "checkpoint_every": STEPS,
            "log_every": 1,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small: PretrainRecipe) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    (made / "recipe.json").write_text(small.model_dump_json())
    return made


class Losses:
    """A report that keeps the losses."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, float]] = {}

    def metric(self, step: int, values: dict[str, float]) -> None:
        self.of[step] = parts(values)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def parts(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "steps_per_s"}


@pytest.fixture(scope="module")
def alone(
    folder: Path, small: PretrainRecipe, scan_folder: Path
) -> tuple[checkpoint.State, dict[int, dict[str, float]]]:
    """The last state and the losses of one process with the joined batch."""
    torch.set_num_threads(1)
    report = Losses()
    with patch.object(pretrain.export, "publish"):
        pretrain.run(
            small, discover(scan_folder), folder / "alone", report,
            device=torch.device("cpu"), should_stop=lambda: False,
        )  # fmt: skip
    state = checkpoint.load_newest(folder / "alone" / "checkpoints")
    assert state is not None
    return state, report.of


def difference(ours: checkpoint.State, theirs: checkpoint.State) -> float:
    """Largest absolute difference of any weight, statistic or queue entry."""
    pairs = [(ours["method"][name], value) for name, value in theirs["method"].items()]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def distance(run: Path, state: checkpoint.State) -> float:
    """`difference` of a run's last state from another."""
    last = checkpoint.load_newest(run / "checkpoints")
    assert last is not None and last["step"] == STEPS
    return difference(last, state)


def train_forked(folder: Path, scans: Path, out: Path, *left_out: str) -> list[str]:
    """Two forked ranks, once for each piece of the joining that they do without."""
    script = Path(__file__).with_name("joined_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "recipe.json"), str(scans), str(out), *left_out],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_equal(
    two: checkpoint.State | None,
    said: Sequence[str],
    state: checkpoint.State,
    losses: dict[int, dict[str, float]],
) -> None:
    """What two ranks said and left is what one process with the joined batch did."""
    events = [json.loads(line) for line in said]
    found = {e["step"]: parts(e["values"]) for e in events if e["event"] == "metric"}
    assert found.keys() == losses.keys() == set(range(1, STEPS + 1))
    for step, values in losses.items():
        assert found[step] == pytest.approx(values, rel=TOLERANCE)
    assert two is not None and two["step"] == STEPS
    assert difference(two, state) < TOLERANCE
    assert torch.equal(two["method"]["queue.pointer"], state["method"]["queue.pointer"])
    assert two["fingerprint"].endswith("2 processes")


@pytest.fixture(scope="module")
def forked(folder: Path, scan_folder: Path) -> tuple[list[str], Path]:
    """What two ranks said, first whole and then without the joined queue; and their folder."""
    return train_forked(folder, scan_folder, folder, "nothing", "queue"), folder


@pytest.mark.timeout(300)
def test_two_ranks_are_one_process_with_the_joined_batch(forked, alone) -> None:
    said, out = forked

    two = checkpoint.load_newest(out / "nothing" / "checkpoints")
    assert_equal(two, said[: len(said) // 2], *alone)


@pytest.mark.timeout(300)
def test_a_queue_that_is_not_joined_is_noticed(forked, alone) -> None:
    _, out = forked

    assert distance(out / "queue", alone[0]) > 10 * TOLERANCE


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_two_ranks_under_torchrun_are_one_process_with_the_joined_batch(
    folder: Path, scan_folder: Path, alone
) -> None:
    done = subprocess.run(
        [
            *TORCHRUN, "-m", "trainer", "pretrain", str(folder / "recipe.json"),
            "--scans", str(scan_folder), "--out", str(folder / "two"), "--events", "jsonl",
        ],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert_equal(checkpoint.load_newest(folder / "two" / "checkpoints"), said, *alone)
    assert sum(json.loads(line)["event"] == "result" for line in said) == 1
    assert (folder / "two" / "bundle" / "model.onnx").is_file()


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_piece_of_the_joining_that_is_left_out_is_noticed(
    folder: Path, scan_folder: Path, alone, tmp_path: Path
) -> None:
    pieces = ("norm", "shuffle", "gradients")

    train_forked(folder, scan_folder, tmp_path, *pieces)

    off = {piece: distance(tmp_path / piece, alone[0]) for piece in pieces}
    assert min(off.values()) > 10 * TOLERANCE, off


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_makes_the_views_of_its_share_of_the_batch(
    rank: int, small: PretrainRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = np.random.default_rng(0).random((32, 32, 24)).astype(np.float16)
    volumes = Resident.of([volume], fill=[0], at_least=(24, 24, 16), device=torch.device("cpu"))
    sampler, method = PairSampler(small.crops, volumes.shapes), Pcrl(small)
    whole = method.make_views(volumes, sampler, 5)
    monkeypatch.setattr(distributed, "share", lambda x: x.chunk(2)[rank])
    monkeypatch.setattr(distributed, "num_before", lambda batch: rank * batch // 2)

    part = method.make_views(volumes, sampler, 5)

    rows = slice(2 * rank, 2 * rank + 2)
    for name in ("clean_o", "clean_m", "input_o", "input_m"):
        ours, theirs = getattr(part, name), getattr(whole, name)
        torch.testing.assert_close(ours, theirs[rows])
        assert not torch.allclose(ours, theirs[slice(2 - 2 * rank, 4 - 2 * rank)])
    assert torch.equal(part.indicators, whole.indicators[:, rows]) and part.mix == whole.mix


@pytest.fixture
def group_of_one(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/x", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_a_joined_norm_of_one_rank_is_batch_norm() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm3d(3))
    nn.init.normal_(plain[0].weight)
    nn.init.normal_(plain[0].bias)
    ours = nn.Sequential(nn.BatchNorm3d(3))
    ours.load_state_dict(plain.state_dict())
    join(ours)
    image = torch.randn(4, 3, 5, 6, 7) * 3 + 10
    weight = torch.randn(4, 3, 5, 6, 7)

    found = []
    for module in (ours, plain):
        x = image.clone().requires_grad_()
        out = module(x)
        (out * weight).sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])

    assert isinstance(ours[0], JoinedBatchNorm)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    assert float((found[0][1] - weight).abs().max()) > 1  # the gradient is no pass-through


def ending(status: int) -> subprocess.Popen[bytes]:
    code = f"kill -{-status} $$" if status < 0 else f"exit {status}"
    return subprocess.Popen(["/bin/sh", "-c", code])


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((0, 79), 79),
        ((1, 76), 76),
        ((64, 64), 64),
        ((1, -9), -9),
        ((1, 1), 1),
        ((-6, 76), 76),  # lost the other, and aborted
        ((-6, -6), -6),
    ],
)
def test_the_exit_status_is_that_of_the_rank_that_failed(
    statuses: tuple[int, ...], expected: int
) -> None:
    assert launch._wait([ending(status) for status in statuses]) == expected


def test_a_rank_that_waits_for_a_failed_one_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    waiting = subprocess.Popen(["/bin/sleep", "60"])

    status = launch._wait([waiting, ending(76)])

    assert status == 76 and waiting.poll() is None
    waiting.kill()
    waiting.wait()


@pytest.mark.parametrize(
    ("batch_size", "groups", "visible", "expected"),
    [(32, 4, 8, 4), (32, 4, 1, 1), (32, 4, 0, 1), (32, 8, 8, 8), (32, 4, 3, 2), (30, 4, 8, 1)],
)
def test_as_many_processes_are_started_as_share_the_batch_evenly(
    batch_size: int, groups: int, visible: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_COUNT", f"print({visible})")
    recipe = PretrainRecipe.model_validate(
        {"batch_size": batch_size, "method": {"momentum_groups": groups}}
    )

    assert launch.choose(recipe, 0) == expected
    if visible > expected:
        with pytest.raises(errors.DataError, match="bad_processes"):
            launch.choose(recipe, visible)


LEAVING = """
import os, sys, time
from pathlib import Path
from trainer import distributed, launch
from trainer.errors import DataError, Preempted

def leave(saved, how):
    try:
        with distributed.group("cpu"):
            if distributed.is_first():
                time.sleep(1)
                saved.touch()
            raise Preempted(1) if how == "stops" else DataError("bad", "in every rank")
    except (Preempted, DataError):
        os.write(1, f"{how} {os.environ['RANK']} {saved.exists()}\\n".encode())
    os._exit(0)

for how in ("stops", "fails"):  # forks: to read torch takes seconds
    folder = Path(sys.argv[1], how)
    folder.mkdir()
    ranks = []
    for rank in (0, 1):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ |= launch._environment(folder, rank, 2)
            leave(folder / "saved", how)
    for rank in ranks:
        os.waitpid(rank, 0)
"""


def test_ranks_that_stop_leave_together_and_one_that_fails_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(tmp_path)]

    said = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout

    assert sorted(said.splitlines()) == [
        "fails 0 True", "fails 1 False", "stops 0 True", "stops 1 True"
    ]  # fmt: skip


def start(folder: Path, scans: Path, out: Path) -> subprocess.Popen[str]:
    recipe = json.loads((folder / "recipe.json").read_text())
    long = {**recipe, "num_steps": 5000, "checkpoint_every": 5000}
    (folder / "long.json").write_text(json.dumps(long))
    return subprocess.Popen(
        [
            sys.executable, "-m", "trainer", "pretrain", str(folder / "long.json"),
            "--scans", str(scans), "--out", str(out), "--events", "jsonl", "--processes", "2",
        ],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def ranks_of(launcher: int) -> dict[str, int]:
    """Process id by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        found |= {v[5:]: int(child) for v in variables if v.startswith("RANK=")}
    return found


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stop_request_to_one_rank_stops_all_at_the_same_step(
    folder: Path, scan_folder: Path, tmp_path: Path
) -> None:
    process = start(folder, scan_folder, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if '"metric"' in line:
            break

    ranks = ranks_of(process.pid)
    os.kill(ranks["1"], signal.SIGTERM)
    events = [json.loads(line) for line in process.stdout]
    process.stdout.close()

    assert process.wait() == errors.PREEMPTED
    assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks.values())
    said = [event["code"] for event in events if event["event"] == "error"]
    assert said == ["preempted"]  # the first rank alone says it
    last = max(event["step"] for event in events if event["event"] == "metric")
    saved = checkpoint.load_newest(tmp_path / "checkpoints")
    assert saved is not None and saved["step"] == last
