"""T-C1, T-C3, T-C4: the stack under random SIGKILL and SIGSTOP; and that the checks can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNAVAILABLE = 69
FULL = pytest.mark.skipif(
    os.environ.get("PCRL_CHAOS_FULL") != "1", reason="long: `make chaos-full` runs it"
)


def chaos(*arguments: str, timeout_s: float = 570.0) -> tuple[int, dict, str]:
    """Exit status, the JSON of the last line, and everything that was said."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode == UNAVAILABLE:
        if os.environ.get("PCRL_TEST_REQUIRE_SERVICES") == "1":
            pytest.fail(done.stderr)
        pytest.skip(done.stderr.strip())
    said = done.stdout + done.stderr[-3000:]
    assert done.stdout.strip(), said
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), said


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_t_c1_nothing_is_lost_doubled_or_stuck_under_random_kills():
    """How soon it drained depends on what runs beside it; `make chaos` asks that too."""
    _, found, said = chaos("--uploads", "60", "--kills", "8", "--patience", "300")

    assert (found["uploads"], found["kills"]) == (60, 8), said
    assert (found["lost"], found["duplicated"], found["stuck"]) == (0, 0, 0), said


@FULL
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_t_c1_nothing_is_lost_doubled_or_stuck_on_the_embedded_pair():
    status, found, said = chaos("--uploads", "20", "--kills", "5", "--embedded")

    assert (status, found["kills"]) == (0, 5), said


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_t_c3_without_ringing_again_a_run_is_stuck():
    arguments = ("--uploads", "2", "--kills", "1", "--only", "worker-train", "--embedded")
    status, found, said = chaos(*arguments, "--patience", "10", "--without", "republishing")

    assert status == 1, said
    assert found["stuck"] > 0, said
    assert "interrupted at attempt 1" in said, said


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_t_c4_a_frozen_worker_that_wakes_after_its_lease_writes_nothing():
    small = ("--uploads", "10", "--kills", "0", "--freezes", "2")
    arguments = (*small, "--trainings", "0", "--embedded", "--lease", "3")
    status, found, said = chaos(*arguments)

    assert (found["lost"], found["duplicated"], found["stuck"]) == (0, 0, 0), said
    assert "froze 2" in said, said
    assert status == 0, said


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_t_c3_without_the_fence_a_frozen_worker_undoes_what_is_done():
    small = ("--uploads", "8", "--kills", "0", "--freezes", "1", "--trainings", "0", "--embedded")
    arguments = (*small, "--lease", "3", "--patience", "15", "--without", "fencing")
    status, found, said = chaos(*arguments)

    assert "froze 1" in said, said
    assert status == 1, said
    assert found["lost"] + found["duplicated"] > 0, said
