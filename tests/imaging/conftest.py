from __future__ import annotations

from pathlib import Path

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
