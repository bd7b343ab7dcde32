"""A run that was interrupted ends bit for bit as one that was not (T-R1), and the comparison sees
every piece that could be lost (T-R2)."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from models.recipe import PretrainRecipe
from trainer import checkpoint, pretrain
from trainer.checkpoint import State
from trainer.data.scans import discover
from trainer.errors import DataError, NonFiniteLossError, Preempted
from trainer.methods.pcrl import Pcrl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


class Silent:
    """A report that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class StopAfter:
    """Asks for a stop at the n-th question, so that no test waits for an export."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def train(recipe: PretrainRecipe, scans: Path, out: Path, report, steps: int) -> checkpoint.State:
    with pytest.raises(Preempted):
        pretrain.run(
            recipe, discover(scans), out, report,
            device=CPU, should_stop=StopAfter(steps), cache=scans.parent / "cache",
        )  # fmt: skip
    state = checkpoint.load_newest(out / "checkpoints")
    assert state is not None
    return state


def kept(state: checkpoint.State) -> dict[str, Any]:
    return {name: state[name] for name in ("step", "method", "optimizer")}


@pytest.mark.parametrize(
    ("num_kills", "num_steps"), [(3, 20), pytest.param(20, 40, marks=pytest.mark.nightly)]
)
@pytest.mark.timeout(300)  # twenty starts, on a machine that may be busy
def test_tr1_a_run_killed_at_random_steps_ends_bit_for_bit_as_an_uninterrupted_one(
    num_kills: int,
    num_steps: int,
    tmp_path: Path,
    scan_folder: Path,
    pretrain_recipe: PretrainRecipe,
    report,
) -> None:
    long = pretrain_recipe.model_copy(update={"num_steps": num_steps})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(long.model_dump_json())
    with patch.object(pretrain.export, "publish"):
        pretrain.run(
            long, discover(scan_folder), tmp_path / "whole", report,
            device=CPU, should_stop=lambda: False,
        )  # fmt: skip
    whole = checkpoint.load_newest(tmp_path / "whole" / "checkpoints")
    out = tmp_path / "killed"
    kills = sorted(random.Random(7).sample(range(4, num_steps - 2), num_kills))

    done = subprocess.run(
        [
            sys.executable, str(Path(__file__).with_name("killed_runs.py")), json.dumps(kills),
            "pretrain", str(recipe), "--scans", str(scan_folder), "--out", str(out),
            "--events", "jsonl", "--threads", "1",
        ],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip

    uninterrupted, report.metrics = dict(report.metrics), []
    pretrain.run(long, discover(scan_folder), out, report, device=CPU, should_stop=lambda: False)

    tries = [json.loads(line) for line in done.stdout.splitlines()]
    assert [attempt["status"] for attempt in tries] == [signal.SIGKILL] * num_kills
    assert not tries[0]["resumed"] and report.logs
    assert all(attempt["resumed"] for attempt in tries[1:])  # every kill came after a checkpoint
    losses = {step: values["loss"] for step, values in report.metrics}
    for attempt in tries:
        again = {int(step): loss for step, loss in attempt["losses"].items()}
        assert all(losses.get(step, loss) == loss for step, loss in again.items())
        losses |= again
    killed = checkpoint.load_newest(out / "checkpoints")
    assert whole is not None and killed is not None and whole["step"] == num_steps
    assert equal(kept(killed), kept(whole))
    assert len(killed["method"]) > 80 and killed["optimizer"]["state"]
    assert losses == {step: values["loss"] for step, values in uninterrupted.items()}
    assert (out / "bundle" / "model.onnx").is_file()


def named(prefix: str, *, buffers: bool) -> Callable[[State, State], None]:
    """Takes the parameters or the running statistics below a prefix from the other state."""

    def take(state: State, other: State) -> None:
        chosen = {
            name: value
            for name, value in other["method"].items()
            if name.startswith(prefix) and (".running_" in name) == buffers
        }
        assert chosen
        state["method"].update(chosen)

    return take


def of_rng(name: str) -> Callable[[State, State], None]:
    return lambda state, other: state["rng"].update({name: other["rng"][name]})


VECTORS, POINTER = "queue.vectors", "queue.pointer"
LEFT_OUT: dict[str, Callable[[State, State], None]] = {
    "queue": lambda s, o: s["method"].update({VECTORS: o["method"][VECTORS]}),
    "queue pointer": lambda s, o: s["method"].update({POINTER: o["method"][POINTER]}),
    "student encoder": named("student.encoder.", buffers=False),
    "student encoder's statistics": named("student.encoder.", buffers=True),
    "decoder": named("student.decoder.", buffers=False),
    "decoder's statistics": named("student.decoder.", buffers=True),
    "output layer": named("student.out.", buffers=False),
    "attention": named("attention.", buffers=False),
    "projector": named("projector.", buffers=False),
    "momentum encoder": named("momentum_encoder.", buffers=False),
    "momentum encoder's statistics": named("momentum_encoder.", buffers=True),
    "momentum projector": named("momentum_projector.", buffers=False),
    "optimizer": lambda s, _: s["optimizer"].update(state={}),
    "step": lambda s, _: s.update(step=s["step"] - 1),
    "torch's generator": of_rng("torch"),
    "numpy's generator": of_rng("numpy"),
    "python's generator": of_rng("python"),
}
"""What a resume that forgot a piece would go on with: that piece as a fresh run has it."""


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, scan_folder: Path, pretrain_recipe: PretrainRecipe
) -> tuple[State, State, dict[str, Any]]:
    """A fresh state, the state after step 4, and what it leads to after step 7."""
    torch.set_num_threads(1)
    torch.manual_seed(pretrain_recipe.seed)
    fresh = {"method": Pcrl(pretrain_recipe).state_dict()}
    torch.rand(1)
    fresh["rng"] = checkpoint.rng_state()
    random.random()
    np.random.random()
    out = tmp_path_factory.mktemp("story")
    middle = train(pretrain_recipe, scan_folder, out, Silent(), 4)
    expected = everything(train(pretrain_recipe, scan_folder, out, Silent(), 3))
    return fresh, middle, expected


def everything(state: State) -> dict[str, Any]:
    return {**kept(state), "rng": state["rng"]}


def go_on(recipe: PretrainRecipe, scans: Path, out: Path, state: State) -> dict[str, Any]:
    """Three steps from a state, in a process whose global generators are elsewhere."""
    checkpoint.save(out / "checkpoints", state["step"], state)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    return everything(train(recipe, scans, out, Silent(), 3))


def test_tr2_with_every_piece_the_comparison_says_equal(
    story, pretrain_recipe: PretrainRecipe, scan_folder: Path, tmp_path: Path
) -> None:
    _, middle, expected = story

    assert expected["step"] == 7
    assert equal(go_on(pretrain_recipe, scan_folder, tmp_path, middle), expected)


@pytest.mark.parametrize("piece", LEFT_OUT)
def test_tr2_the_comparison_sees_a_piece_that_is_left_out(
    piece: str, story, pretrain_recipe: PretrainRecipe, scan_folder: Path, tmp_path: Path
) -> None:
    fresh, middle, expected = story
    state = copy.deepcopy(middle)

    LEFT_OUT[piece](state, fresh)

    assert not equal(go_on(pretrain_recipe, scan_folder, tmp_path, state), expected)


def test_a_rerun_with_another_recipe_is_refused(
    tmp_path: Path, scan_folder: Path, pretrain_recipe: PretrainRecipe, report
) -> None:
    train(pretrain_recipe, scan_folder, tmp_path, report, 3)
    other = pretrain_recipe.model_copy(update={"seed": 1})

    with pytest.raises(DataError, match="resume_mismatch"):
        pretrain.run(
            other, discover(scan_folder), tmp_path, report, device=CPU, should_stop=lambda: True
        )


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, scan_folder: Path, pretrain_recipe: PretrainRecipe, report
) -> None:
    wild = pretrain_recipe.model_copy(update={"learning_rate": 1e30, "checkpoint_every": 1})

    with pytest.raises(NonFiniteLossError) as caught:
        pretrain.run(
            wild, discover(scan_folder), tmp_path, report, device=CPU, should_stop=lambda: False
        )

    state = checkpoint.load_newest(tmp_path / "checkpoints")
    assert caught.value.status == 78 and caught.value.step > 1
    assert state is not None and state["step"] == caught.value.step - 1


def test_a_broken_newest_checkpoint_makes_the_run_go_on_from_the_one_before(
    tmp_path: Path, scan_folder: Path, pretrain_recipe: PretrainRecipe, report
) -> None:
    expected = kept(train(pretrain_recipe, scan_folder, tmp_path, report, 8))
    newest = max((tmp_path / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-50])

    again = kept(train(pretrain_recipe, scan_folder, tmp_path, report, 2))  # 6 -> 8

    assert ("info", "resuming after step 6") in report.logs
    assert equal(again, expected)
    shutil.rmtree(tmp_path)
