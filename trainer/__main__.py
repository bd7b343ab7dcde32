"""`python -m trainer COMMAND`: the shell's and the supervisor's way in.

The commands are `pretrain`, `finetune`, `experiment`, `probe`, `dataset` and `export`.

Exit status: 0 done; 64 bad recipe or data; 75 stopped on request, checkpoint written; 76 GPU out
of memory; 77 host out of memory; 78 non-finite loss; 79 parity gate failed; 1 anything else.

Pretraining runs in one process or one a GPU, started by `--processes` or by torchrun.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError

from imaging.datasets import READERS, Options
from models.bundle import BundleError
from models.experiment.plan import Plan
from models.recipe import AnyRecipe, ImageNet, PretrainRecipe, PretrainRecipe2d, Recipe, SplitShares
from trainer import errors, launch
from trainer.errors import DataError, TrainingError
from trainer.report import Follower, Human, JsonLines, Report

if TYPE_CHECKING:  # torch takes seconds to import; a bad recipe is refused before
    import torch

_PR_SET_PDEATHSIG = 1
_KINDS = {"pretrain": ("pretrain",), "finetune": ("finetune", "classify")}
"""Which recipes a command takes."""
_RECIPE: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)
Read = TypeVar("Read")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    is_rank = "RANK" in os.environ
    if args.events == "jsonl" or is_rank:
        die_with_parent()
    report: Report = JsonLines() if args.events == "jsonl" else Human()
    if is_rank and os.environ["RANK"] != "0":
        report = Follower(report)
    stop = _StopSignal()
    try:
        if not is_rank and getattr(args, "processes", 1) != 1:
            recipe = read_recipe(args.recipe, args.command)
            assert isinstance(recipe, PretrainRecipe | PretrainRecipe2d)
            if (num_processes := launch.choose(recipe, args.processes)) > 1:
                return _end_with(launch.launch(arguments, num_processes))
        _run(args, report, stop)
    except Exception as error:  # noqa: BLE001 - the border of the process: every end gets a status
        status, code, detail = classify(error)
        if status == errors.FAILED:
            traceback.print_exc()
        report.error(code, detail)
        return status
    return 0


def _end_with(status: int) -> int:
    """The exit status; a rank that was ended by a signal ends us by the same one."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def die_with_parent() -> None:
    """Let Linux kill this process when its supervisor dies, so that no orphan holds the GPU.

    Only for supervised runs (`--events jsonl`) and ranks of a run: a human's `nohup` must survive
    the shell. A supervisor that was killed while this process still read its imports is found by
    the process id that it left in the environment.
    """
    parent = int(os.environ.pop(launch.SUPERVISOR, os.getppid()))  # ranks must not inherit it
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


def classify(error: Exception) -> tuple[int, str, str]:
    """Exit status, code and detail of what ended a run."""
    if isinstance(error, TrainingError):
        return error.status, error.code, error.detail
    if isinstance(error, BundleError):
        return errors.BAD_INPUT, error.code, error.detail
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return errors.GPU_OUT_OF_MEMORY, "gpu_out_of_memory", _first_line(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return errors.HOST_OUT_OF_MEMORY, "host_out_of_memory", _first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.FAILED, "disk_full", "no room left in the output folder"
    return errors.FAILED, "failed", f"{type(error).__name__}: {_first_line(error)}"


class _StopSignal:
    """Turns true at the first SIGTERM or Ctrl-C; the loop then ends after its step."""

    def __init__(self) -> None:
        self._stops = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def __call__(self) -> bool:
        return self._stops

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops = True


def _run(args: argparse.Namespace, report: Report, stop: _StopSignal) -> None:
    if args.command == "dataset":
        _list_dataset(args, report)
        return
    if args.command == "probe":
        _probe(args, report)
        return
    if args.command == "experiment":
        _experiment(args, report, stop)
        return
    recipe = None if args.command == "export" else read_recipe(args.recipe, args.command)
    import torch

    from trainer import checkpoint, distributed, export, finetune, folder, imagenet, pretrain
    from trainer.data.scans import discover

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "export":
        export.publish(checkpoint.load(args.checkpoint), args.out / folder.BUNDLE, report)
        return
    device = _device(args.device)
    assert recipe is not None
    dims = recipe.network.dims
    if isinstance(recipe, PretrainRecipe | PretrainRecipe2d):
        scans = discover(args.scans, dims=dims)
        if isinstance(recipe.method, ImageNet) and args.weights is not None:
            assert isinstance(recipe, PretrainRecipe2d)
            imagenet.run(
                recipe, args.weights, scans, args.out, report,
                device=device, run_id=args.run_id, cache=args.cache,
            )  # fmt: skip
            return
        with distributed.group(device.type) as device:
            pretrain.run(
                recipe, scans, args.out, report,
                device=device, should_stop=stop, run_id=args.run_id, cache=args.cache,
            )  # fmt: skip
    else:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DataError("bad_processes", "fine-tuning runs in one process")
        scans = discover(args.scans, channels=recipe.channels, shares=recipe.split, dims=dims)
        finetune.run(
            recipe, scans, args.out, report,
            device=device, should_stop=stop, run_id=args.run_id, cache=args.cache,
            parent=args.parent,
        )  # fmt: skip


def _list_dataset(args: argparse.Namespace, report: Report) -> None:
    """Write what `--scans` takes; prints what a recipe needs to know of it."""
    from trainer.data.layouts import write_list

    options = Options(args.channel, args.uncertain, args.unmentioned, args.views)
    shares = SplitShares(seed=args.seed)
    found = write_list(
        args.kind, args.folder, args.out, options=options, shares=shares, report=report
    )
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def _probe(args: argparse.Namespace, report: Report) -> None:
    """Print what a frozen encoder knows of rotation or position, as JSON."""
    import torch

    from trainer.data.scans import discover
    from trainer.probes.encoders import load_encoder
    from trainer.probes.run import run

    if args.threads:
        torch.set_num_threads(args.threads)
    dims = load_encoder(args.model)[1].network.dims
    shares = SplitShares(train=0.7, val=0.0, test=0.3, seed=args.seed)
    scans = discover(args.scans, shares=shares, dims=dims)
    with tempfile.TemporaryDirectory() as made:
        cache, device = args.cache or Path(made), _device(args.device)
        found = run(args.probe, args.model, scans, cache, report, device=device, seed=args.seed)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def _experiment(args: argparse.Namespace, report: Report, stop: _StopSignal) -> None:
    """Work through a plan; trainings that failed end the process with `trainings_failed`."""
    plan = _read(args.plan, TypeAdapter(Plan), ())
    import torch

    from trainer import experiment

    if args.threads:
        torch.set_num_threads(args.threads)
    found = experiment.run(
        plan, args.source, args.target, args.out, report,
        device=_device(args.device), should_stop=stop, weights=args.weights, retry=args.retry,
    )  # fmt: skip
    if failed := [key for key, one in found.items() if one.state == "failed"]:
        raise TrainingError(
            "trainings_failed",
            f"{len(failed)} of {len(found)} trainings failed; report.md says why, and --retry "
            "does them again",
        )


def read_recipe(path: Path, command: str) -> AnyRecipe:
    """Read a recipe that the command takes.

    Raises:
        DataError: `bad_recipe`, naming the first field that is wrong.
    """
    kinds = _KINDS[command]
    recipe = _read(path, _RECIPE, kinds)
    if recipe.kind not in kinds:
        expected = " or ".join(kinds)
        raise DataError("bad_recipe", f"kind: this is a {recipe.kind} recipe, expected {expected}")
    return recipe


def _read(path: Path, form: TypeAdapter[Read], kinds: tuple[str, ...]) -> Read:
    """Read a file of JSON; `kinds` are tags in the place of an error that no file holds."""
    try:
        return form.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError("bad_recipe", "the recipe file does not exist") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        tags = (*kinds, "pretrain_2d", "classify_2d")
        field = ".".join(str(part) for part in first["loc"] if part not in tags)
        raise DataError("bad_recipe", f"{field or 'recipe'}: {first['msg']}") from error


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("no_gpu", "cuda was asked for and torch sees no GPU")
    return torch.device(name)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for kind in ("pretrain", "finetune"):
        command = commands.add_parser(kind)
        command.add_argument("recipe", type=Path, help="JSON file")
        command.add_argument("--scans", type=Path, required=True, help="folder or JSON list")
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        command.add_argument("--run-id")
        command.add_argument("--cache", type=Path, help="preprocessed volumes; OUT/cache")
        if kind == "pretrain":
            command.add_argument(
                "--processes", type=int, default=1, help="that share each batch; 0 is one a GPU"
            )
            command.add_argument("--weights", type=Path, help="of ImageNet, for that method")
        else:
            command.add_argument("--parent", type=Path, help="bundle to start from")
        _add_common(command)
    _add_dataset(commands.add_parser("dataset"))
    _add_probe(commands.add_parser("probe"))
    _add_experiment(commands.add_parser("experiment"))
    command = commands.add_parser("export")
    command.add_argument("--checkpoint", type=Path, required=True)
    _add_common(command)
    return parser


def _add_dataset(command: argparse.ArgumentParser) -> None:
    command.add_argument("kind", choices=READERS, help="whose layout the folder has")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path, required=True, help="folder of the list")
    command.add_argument("--channel", help="only this one of several")
    command.add_argument("--uncertain", choices=("ignore", "zeros", "ones"), default="ignore")
    command.add_argument("--unmentioned", choices=("zeros", "ignore"), default="zeros")
    command.add_argument("--views", choices=("frontal", "lateral", "all"), default="frontal")
    command.add_argument("--seed", type=int, default=0, help="of the split by patient")
    command.add_argument("--events", choices=("human", "jsonl"), default="human")


def _add_probe(command: argparse.ArgumentParser) -> None:
    command.add_argument("probe", choices=("rotation", "position"))
    command.add_argument("model", type=Path, help="checkpoint or bundle")
    command.add_argument("--scans", type=Path, required=True, help="folder or JSON list")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--cache", type=Path, help="preprocessed volumes; else kept nowhere")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--events", choices=("human", "jsonl"), default="human")
    command.add_argument("--threads", type=int, default=0, help="0 lets torch choose")


def _add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("plan", type=Path, help="JSON file: methods, fine-tuning, ratios, seeds")
    command.add_argument("--source", type=Path, required=True, help="scans to pretrain on")
    command.add_argument("--target", type=Path, required=True, help="labelled scans")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument(
        "--weights", type=Path, action="append", default=[],
        help="of ImageNet, for methods that take them; once for each file",
    )  # fmt: skip
    command.add_argument("--retry", action="store_true", help="do failed trainings again")
    _add_common(command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--events", choices=("human", "jsonl"), default="human")
    command.add_argument("--threads", type=int, default=0, help="0 lets torch choose")


def _end(status: int) -> NoReturn:
    """Exit; a rank without Python's teardown, in which torch may hang or abort (`distributed`)."""
    if "RANK" not in os.environ:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _end(main())
