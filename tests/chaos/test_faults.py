"""T-C7: a process fails at every named point, in every way, and the run still ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks.chaos import load
from service import faults, migrate
from service.settings import Settings
from service.storage import Store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CALL = re.compile(r"faults\.point\(\"([^\"]+)\"\)")


def points() -> list[str]:
    """Every point in the code, read from the code."""
    return [
        name
        for package in ("service", "trainer")
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in CALL.findall(path.read_text(encoding="utf-8"))
    ]


class Runner:
    """The process that forks (fault_runner.py), and a template of a migrated data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = Settings(data_dir=folder / "template")
        settings.data_dir.mkdir()
        Store(settings.data_dir)
        migrate.upgrade(settings.database_url)
        other = folder / "model"
        other.mkdir()
        migrate.upgrade(f"sqlite:///{other / 'pcrl.sqlite3'}")
        load.register_model(Settings(data_dir=other), folder)  # leaves folder / "bundle"
        nib.save(nib.Nifti1Image(load.scan_of(1), np.eye(4)), folder / "scan.nii")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PCRL_")}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fault_runner.py"), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**inherited, "PYTHONPATH": str(ROOT)},
            text=True,
        )

    def play(self, name: str, kind: str) -> dict:
        folder = self.folder / f"{name}-{kind}"
        shutil.copytree(self.folder / "template", folder / "data")
        case = {"folder": str(folder), "fault": f"{name}:{kind}:{folder / 'struck'}"}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        errors = folder / "errors"
        found["errors"] = errors.read_text()[-3000:] if errors.exists() else ""
        return found


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    memory = Path("/dev/shm")  # a killed process loses no file of a tmpfs, and fsync costs nothing
    if os.access(memory, os.W_OK):
        folder = Path(tempfile.mkdtemp(prefix="pcrl-faults-", dir=memory))
    runner = Runner(folder)
    yield runner
    shutil.rmtree(folder, ignore_errors=True)
    runner.process.stdin.close()
    runner.process.wait(10)
    runner.process.stdout.close()


def test_t_c7_every_point_has_a_name_of_its_own() -> None:
    assert len(points()) == len(set(points())) >= 20


@pytest.mark.parametrize("kind", ["kill", "error", pytest.param("full", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", points())
def test_t_c7_a_run_ends_whatever_fails_at(runner, name, kind) -> None:
    found = runner.play(name, kind)

    assert found["struck"], f"the scenario never came to this point\n{found['errors']}"
    assert found["runs"] == 1, found  # one key, one run, however often the request was sent
    assert found["ends"] == 1, found
    assert (found["corrupt"], found["open_attempts"]) == (0, 0), found
    if kind != "error":  # an exception that nobody foresaw may end a run as failed
        assert found["states"] == ["succeeded"], found
    if found["states"] == ["succeeded"]:
        assert found["files"] == 1, found
        assert found["won"] == found["fence"][0], found
    else:
        assert (found["states"], found["files"], found["won"]) == (["failed"], 0, []), found


def test_t_c7_a_point_that_is_not_armed_does_nothing(tmp_path) -> None:
    faults.arm(f"here:error:{tmp_path / 'struck'}")
    try:
        faults.point("elsewhere")
        with pytest.raises(faults.Fault):  # the control
            faults.point("here")
        faults.point("here")  # it strikes once
    finally:
        faults.arm(None)
    faults.point("here")
