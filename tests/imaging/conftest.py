from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from imaging import phantom
from imaging.phantom import Phantom

_DATA = (Path(__file__).resolve().parents[2] / "../shared/data").resolve()


@pytest.fixture(scope="session")
def data() -> Path:
    """The real scans, read in place."""
    if not _DATA.is_dir():
        pytest.skip("../shared/data is absent")
    return _DATA


@pytest.fixture(scope="session")
def small() -> Phantom:
    """A small phantom with an odd number of voxels along each axis."""
    return phantom.make(7, shape=(45, 39, 21), spacing_mm=(8.5, 9.0, 12.0))


@pytest.fixture(scope="session")
def small_series(small: Phantom, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Its DICOM files, from the feet up."""
    folder = tmp_path_factory.mktemp("series")
    return phantom.write_dicom_series(small.volume, folder, seed=7)


@pytest.fixture(scope="session")
def small_zip(small: Phantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its DICOM files in a zip."""
    path = tmp_path_factory.mktemp("zip") / "series.zip"
    return phantom.write_dicom_zip(small.volume, path, seed=7)


@pytest.fixture(scope="session")
def series() -> ModuleType:
    """The helpers of `dicom_series.py` (test folders are no packages)."""
    path = Path(__file__).with_name("dicom_series.py")
    spec = importlib.util.spec_from_file_location("dicom_series", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
