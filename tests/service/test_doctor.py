"""`pcrl doctor` says which walls stand around the readers of scans."""

from __future__ import annotations

import subprocess
import sys

import pytest

from service import doctor
from service.settings import Settings


@pytest.mark.skipif(sys.platform != "linux", reason="the walls are of Linux")
def test_the_walls_around_readers_are_examined(tmp_path, monkeypatch):
    settings = Settings(data_dir=tmp_path)

    def finding():
        (found,) = (one for one in doctor.examine(settings) if "readers" in one.what)
        return found

    standing = finding()
    real = subprocess.run
    fail = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(doctor.subprocess, "run", lambda _command, **how: real(fail, **how))
    fallen = finding()

    assert standing.is_ok
    assert standing.detail.startswith("limits, system calls")
    assert not fallen.is_ok
    assert "seccomp" in fallen.detail
