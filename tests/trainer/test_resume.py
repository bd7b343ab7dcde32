"""A run that was interrupted ends bit for bit as one that was not (T-R1), and the comparison sees
every piece that could be lost (T-R2)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.recipe import PretrainRecipe
from trainer import checkpoint, pretrain
from trainer.data.scans import discover
from trainer.errors import DataError, NonFiniteLossError, Preempted

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


def drive(arguments: list[str], kill_at: int | None) -> tuple[int, list[dict[str, Any]]]:
    """Run the command line; SIGKILL it once it reports a step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments, "--events", "jsonl", "--threads", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    events = []
    assert process.stdout is not None
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "metric" and events[-1]["step"] == kill_at:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait(), events


def test_a_run_killed_again_and_again_ends_bit_for_bit_as_an_uninterrupted_one(
    tmp_path: Path, scan_folder: Path, pretrain_recipe: PretrainRecipe, report
) -> None:
    steps = pretrain_recipe.num_steps
    recipe = tmp_path / "recipe.json"
    recipe.write_text(pretrain_recipe.model_dump_json())
    pretrain.run(
        pretrain_recipe, discover(scan_folder), tmp_path / "whole", report,
        device=CPU, should_stop=lambda: False,
    )  # fmt: skip
    whole = checkpoint.load_newest(tmp_path / "whole" / "checkpoints")
    out = tmp_path / "killed"
    arguments = ["pretrain", str(recipe), "--scans", str(scan_folder), "--out", str(out)]
    losses: dict[int, float] = {}

    kills = sorted(random.Random(7).sample(range(4, steps), 3))
    resumed = 0
    for kill_at in [*kills, None]:
        status, events = drive(arguments, kill_at)
        assert status == (0 if kill_at is None else -signal.SIGKILL)
        resumed += any("resuming after" in event.get("message", "") for event in events)
        losses |= {e["step"]: e["values"]["loss"] for e in events if e["event"] == "metric"}

    killed = checkpoint.load_newest(out / "checkpoints")
    assert resumed == 3  # every kill came after a checkpoint
    assert whole is not None and killed is not None and whole["step"] == steps
    assert equal(kept(killed), kept(whole))
    assert len(killed["method"]) > 80 and killed["optimizer"]["state"]
    assert losses == {step: values["loss"] for step, values in report.metrics}
    assert (out / "bundle" / "model.onnx").is_file()


NORM = "momentum_encoder.down64.first.norm"
MUTATIONS = {
    "queue": lambda s: s["method"]["queue.vectors"].copy_(s["method"]["queue.vectors"].flip(0)),
    "queue pointer": lambda s: s["method"]["queue.pointer"].add_(1),
    "student": lambda s: s["method"]["student.decoder.up64.up.weight"].mul_(1.001),
    "running mean": lambda s: s["method"]["student.encoder.down64.first.norm.running_mean"].zero_(),
    "attention": lambda s: s["method"]["attention.post_conv.weight"].mul_(1.001),
    "projector": lambda s: s["method"]["projector.fc1.weight"].mul_(1.001),
    "momentum encoder": lambda s: s["method"]["momentum_encoder.down64.first.conv.weight"].zero_(),
    "momentum buffers": lambda s: s["method"][f"{NORM}.running_var"].zero_(),
    "momentum projector": lambda s: s["method"]["momentum_projector.fc1.weight"].zero_(),
    "optimizer": lambda s: s["optimizer"].update(state={}),
    "step": lambda s: s.update(step=s["step"] - 1),
}  # fmt: skip


def test_the_comparison_sees_every_piece_that_is_lost(
    tmp_path: Path, scan_folder: Path, pretrain_recipe: PretrainRecipe, report
) -> None:
    middle = train(pretrain_recipe, scan_folder, tmp_path / "base", report, 4)
    expected = kept(train(pretrain_recipe, scan_folder, tmp_path / "base", report, 3))
    untouched = tmp_path / "untouched"
    checkpoint.save(untouched / "checkpoints", 4, middle)

    found = {}
    for name, mutate in MUTATIONS.items():
        state = checkpoint.load_newest(untouched / "checkpoints")
        assert state is not None
        mutate(state)
        out = tmp_path / name
        checkpoint.save(out / "checkpoints", state["step"], state)
        found[name] = equal(kept(train(pretrain_recipe, scan_folder, out, report, 3)), expected)

    assert expected["step"] == 7
    assert equal(kept(train(pretrain_recipe, scan_folder, untouched, report, 3)), expected)
    assert found == dict.fromkeys(MUTATIONS, False)


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
