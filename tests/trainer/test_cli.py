"""The trainer from a shell: exit statuses, events, a stop on request."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import bundle
from models.recipe import FinetuneRecipe, PretrainRecipe
from trainer import __main__ as command
from trainer import errors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MACHINE = ("--events", "jsonl", "--threads", "1")


def trainer(*arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "trainer", *map(str, arguments), *MACHINE],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


Here = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Here]:
    """As `trainer`, in this process, which has torch at hand: for what no process of its own shows.

    It does not die with whoever started the tests, and its handlers of signals go.
    """
    monkeypatch.setattr(command, "die_with_parent", lambda: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments: object) -> tuple[int, list[dict[str, Any]], str]:
        status = command.main([*map(str, arguments), *MACHINE])
        said = capsys.readouterr()
        return status, [json.loads(line) for line in said.out.splitlines()], said.err

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.nightly
@pytest.mark.timeout(300)  # two trainings and three exports: 60 s on loaded cores
def test_the_whole_way_from_a_shell_with_a_stop_in_the_middle(
    tmp_path: Path,
    scan_folder: Path,
    pretrain_recipe: PretrainRecipe,
    finetune_recipe: FinetuneRecipe,
    here: Here,
) -> None:
    few = pretrain_recipe.model_copy(update={"num_steps": 40})
    (tmp_path / "pre.json").write_text(few.model_dump_json())
    (tmp_path / "fine.json").write_text(finetune_recipe.model_dump_json())
    pre, fine = tmp_path / "pre", tmp_path / "fine"
    arguments = ["pretrain", tmp_path / "pre.json", "--scans", scan_folder, "--out", pre]

    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, arguments), *MACHINE],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if '"metric"' in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = [json.loads(line) for line in process.stdout]
    process.stdout.close()
    stopped = process.wait()
    resumed, events, stderr = trainer(*arguments)
    tuned, more, _ = here(
        "finetune", tmp_path / "fine.json", "--scans", scan_folder, "--out", fine,
        "--parent", pre / "bundle", "--run-id", "run-7",
    )  # fmt: skip
    newest = max((fine / "checkpoints").glob("best-*.pt"))
    exported, _, _ = here("export", "--checkpoint", newest, "--out", tmp_path / "again")

    assert stopped == 75 and rest[-1]["code"] == "preempted"
    assert resumed == 0, stderr
    assert any("resuming after step" in event.get("message", "") for event in events)
    assert events[-1] == {
        "event": "result", "bundle": "bundle", "digest": bundle.digest_of(pre / "bundle")
    }  # fmt: skip
    assert (tuned, exported) == (0, 0)
    manifest = bundle.load(fine / "bundle")
    assert manifest.lineage.parent_digest == bundle.digest_of(pre / "bundle")
    assert manifest.lineage.run_id == "run-7" and len(manifest.lineage.loaded_keys) == 32
    assert any("dice_organ" in event.get("values", {}) for event in more)
    assert bundle.load(tmp_path / "again" / "bundle").lineage == manifest.lineage


def test_a_bad_recipe_is_refused_before_the_seconds_that_torch_takes(tmp_path: Path) -> None:
    code = "import sys; from trainer.__main__ import main; print(main(sys.argv[1:]), *sys.modules)"
    arguments = ["pretrain", str(tmp_path / "absent.json"), "--scans", "x", "--out", "x"]

    said = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout.split()

    assert said[0] == str(errors.BAD_INPUT) and "trainer.launch" in said
    assert "torch" not in said


def test_a_bad_recipe_names_its_field(tmp_path: Path, scan_folder: Path) -> None:
    (tmp_path / "bad.json").write_text('{"kind": "pretrain", "crops": {"min_iou": 2}}')

    status, events, _ = trainer(
        "pretrain", tmp_path / "bad.json", "--scans", scan_folder, "--out", tmp_path / "out"
    )

    assert status == 64
    assert events[-1]["code"] == "bad_recipe" and "crops.min_iou" in events[-1]["detail"]


def test_a_bad_plan_of_an_experiment_names_its_field(tmp_path: Path, scan_folder: Path) -> None:
    method = {"name": "scratch"}
    for fields, where in (({"ratios": [2]}, "ratios.0"), ({"seed": 1}, "seed")):
        plan = {"methods": [method], "finetune": {"kind": "finetune", "labels": {"a": 1}}, **fields}
        (tmp_path / "plan.json").write_text(json.dumps(plan))

        status, events, _ = trainer(
            "experiment", tmp_path / "plan.json", "--source", scan_folder, "--target", scan_folder,
            "--out", tmp_path / "out",
        )  # fmt: skip

        assert status == errors.BAD_INPUT
        (error,) = events
        assert error["code"] == "bad_recipe" and error["detail"].startswith(f"{where}: ")


def test_no_scans_is_bad_data(tmp_path: Path, pretrain_recipe: PretrainRecipe, here: Here) -> None:
    (tmp_path / "pre.json").write_text(pretrain_recipe.model_dump_json())
    (tmp_path / "empty").mkdir()

    status, events, _ = here(
        "pretrain", tmp_path / "pre.json", "--scans", tmp_path / "empty", "--out", tmp_path / "out"
    )

    assert status == 64 and events[-1]["code"] == "no_scans"


def make_errors() -> list[tuple[Exception, int, str]]:
    import torch

    return [
        (errors.Preempted(3), 75, "preempted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 76, "gpu_out_of_memory"),
        (MemoryError(), 77, "host_out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 77, "host_out_of_memory"),
        (errors.NonFiniteLossError(3), 78, "non_finite_loss"),
        (errors.ParityError("x"), 79, "parity_failed"),
        (OSError(28, "No space left on device"), 1, "disk_full"),
        (errors.DiskFullError("x"), 1, "disk_full"),
        (KeyError("x"), 1, "failed"),
    ]


@pytest.mark.parametrize(("error", "status", "code"), make_errors())
def test_every_end_has_its_exit_status(error: Exception, status: int, code: str) -> None:
    assert command.classify(error)[:2] == (status, code)


def test_a_training_whose_supervisor_died_during_its_imports_ends_at_once(tmp_path):
    command = [sys.executable, "-m", "trainer", "pretrain", str(tmp_path / "absent.json")]
    command += ["--scans", str(tmp_path), "--out", str(tmp_path / "out"), "--events", "jsonl"]
    statuses = [
        subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TRAINER_SUPERVISOR_PID": str(pid)},
            stdout=subprocess.DEVNULL,
        ).returncode
        for pid in (2**22 + 1, os.getpid())  # nobody; and the control, who is there
    ]

    assert statuses == [-9, errors.BAD_INPUT]


def test_an_experiments_weights_reach_the_method_that_takes_them(
    tmp_path: Path, scan_folder: Path, here: Here
) -> None:
    network = {"kind": "resnet18_unet2d"}
    pretrain = {"kind": "pretrain", "network": network, "method": {"name": "imagenet"}}
    finetune = {"kind": "classify", "network": network, "labels": ["a"]}
    plan = {"methods": [{"name": "others", "pretrain": pretrain}], "finetune": finetune}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "text.pth").write_text("no tensors")
    asked = [
        "experiment", tmp_path / "plan.json", "--source", scan_folder, "--target", scan_folder,
        "--out", tmp_path / "out",
    ]  # fmt: skip

    for more, said in (
        ([], "others: it takes its weights from a file"),
        (["--weights", tmp_path / "text.pth"], "others: neither safetensors nor a state dict"),
    ):
        status, events, _ = here(*asked, *more)
        assert status == errors.BAD_INPUT and events[-1]["code"] == "bad_weights"
        assert events[-1]["detail"].startswith(f"method {said}")
    assert not (tmp_path / "out").exists()
