"""`benchmarks/gpu.sh` runs where there is torch and little else."""

import subprocess
import sys

import pytest

ABSENT = (
    "PIL", "celery", "fastapi", "gdcm", "highdicom", "httpx", "monai", "nibabel", "onnx",
    "pydantic_settings", "pydicom", "safetensors", "sqlalchemy",
)  # fmt: skip
BLOCKED = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"


def imports(modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{BLOCKED}import {modules}"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.nightly
def test_the_step_of_pretraining_needs_none_of_the_services_packages() -> None:
    ran = imports("benchmarks.bench_step, benchmarks.bench_input")

    assert ran.returncode == 0, ran.stderr
    assert "nibabel" in imports("imaging.nifti").stderr
