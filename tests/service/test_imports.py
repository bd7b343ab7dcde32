"""What a process does not load: what it has no use for would cost at every start of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READERS = ("nibabel", "pydicom", "gdcm", "PIL", "highdicom")
WEB = ("fastapi", "starlette", "uvicorn")
NETWORKS = ("torch", "onnxruntime", "monai")
SELDOM = ("alembic", "redis", "scipy.stats", "scipy.spatial")
PROCESSES = {
    "service.cli": (
        *(*READERS, *NETWORKS, *SELDOM, *WEB, "scipy", "numpy", "celery", "sqlalchemy", "httpx"),
        *("service.db", "service.schemas", "models.recipe"),
    ),
    "service.app": (*READERS, *NETWORKS, *SELDOM, "scipy", "SimpleITK", "rich"),
    "service.upkeep": (*READERS, *NETWORKS, *SELDOM, *WEB, "scipy", "SimpleITK", "rich"),
    "service.worker": (*READERS, *NETWORKS, *SELDOM, *WEB, "scipy", "SimpleITK", "rich"),
    "trainer.tasks": (*READERS, *NETWORKS, *SELDOM, *WEB, "scipy", "SimpleITK", "rich"),
    "service.tasks": ("torch", "monai", *SELDOM, *WEB, "highdicom", "rich"),
}


@pytest.mark.parametrize("module", PROCESSES)
def test_a_process_does_not_load_what_it_has_no_use_for(module):
    loaded = modules_after(f"import {module}")

    assert module in loaded  # the control
    assert sorted(loaded & set(PROCESSES[module])) == []


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))
