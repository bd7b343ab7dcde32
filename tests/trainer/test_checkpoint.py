"""Checkpoints survive rot, a full disk, and say when they are another run's."""

import random
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer import checkpoint
from trainer.errors import DataError, DiskFullError


def state(value: float) -> checkpoint.State:
    return {"weights": torch.full((1000,), value), "rng": checkpoint.rng_state()}


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(9.0), kind="best", keep=1)
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, state(step))

    kept = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())

    assert kept == ["best-000000001", "step-000000010", "step-000000015"]


@pytest.mark.parametrize("damage", ["cut off", "one bit", "emptied"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 5, state(5.0))
    newest = checkpoint.save(tmp_path, 10, state(10.0))
    whole = checkpoint.load_newest(tmp_path)
    data = bytearray(newest.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    newest.write_bytes(data[: {"cut off": 100, "one bit": len(data), "emptied": 0}[damage]])
    warnings: list[str] = []

    found = checkpoint.load_newest(tmp_path, warn=warnings.append)

    assert whole is not None and whole["step"] == 10
    assert found is not None and found["step"] == 5 and float(found["weights"][0]) == 5.0
    assert len(warnings) == 1


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    older = checkpoint.save(tmp_path, 5, {"weights": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskFullError):
            checkpoint.save(tmp_path, 10, {"weights": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert list(tmp_path.iterdir()) == [older]
    assert checkpoint.is_whole(older)
    checkpoint.save(tmp_path, 10, {"weights": torch.zeros(1_000_000)})  # with room it works


def test_t_d3_a_really_full_disk_keeps_the_older_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    """On a tmpfs of 2 MiB; skipped where mounting is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        older = checkpoint.save(tmp_path, 5, {"weights": torch.zeros(10)})
        data = older.read_bytes()

        with pytest.raises(DiskFullError):
            checkpoint.save(tmp_path, 10, {"weights": torch.zeros(1_000_000)})

        assert list(tmp_path.iterdir()) == [older]
        assert older.read_bytes() == data
        newer = checkpoint.save(tmp_path, 10, {"weights": torch.ones(100_000)})  # there is room
        assert checkpoint.is_whole(newer)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def test_the_global_generators_come_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, state(0.0))
    expected = (torch.rand(3).tolist(), np.random.random(3).tolist(), random.random())

    checkpoint.restore_rng(checkpoint.load(path)["rng"])

    assert (torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()) == expected


@pytest.mark.parametrize("field", ["recipe_digest", "data_digest"])
def test_another_recipe_or_other_data_is_refused(field: str) -> None:
    ours = {"recipe_digest": "a", "data_digest": "b"}
    checkpoint.check_same_run(ours, recipe_digest="a", data_digest="b")

    with pytest.raises(DataError, match=field):
        checkpoint.check_same_run({**ours, field: "x"}, recipe_digest="a", data_digest="b")
