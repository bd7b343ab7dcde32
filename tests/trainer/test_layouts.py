"""A public data set becomes a list that a training reads, without a service."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its usual name

from imaging.intake import read_scan
from models.recipe import FinetuneRecipe, Preprocessing, ZScore
from trainer.__main__ import main
from trainer.data.cache import VolumeCache
from trainer.data.scan_set import digest_of
from trainer.data.scans import discover

RANDOM = np.random.default_rng(5)


def nifti(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(path)


@pytest.fixture
def msd(tmp_path: Path) -> Path:
    """Ten training cases of two channels, and one for testing."""
    folder = tmp_path / "Task05_Prostate"
    names = [f"prostate_{number:02d}.nii.gz" for number in range(10)]
    for name in names:
        nifti(folder / "imagesTr" / name, RANDOM.integers(0, 900, (8, 9, 7, 2), dtype=np.int16))
        nifti(folder / "labelsTr" / name, RANDOM.integers(0, 3, (8, 9, 7), dtype=np.uint8))
    nifti(folder / "imagesTs" / "prostate_90.nii.gz", np.ones((8, 9, 7, 2), np.int16))
    pairs = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    described = {
        "modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": pairs, "test": ["./imagesTs/prostate_90.nii.gz"],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(described))
    (folder / "readme.txt").write_text("hello")
    return folder


def test_a_data_set_becomes_a_list_that_fine_tuning_reads(
    msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    assert main(["dataset", "msd", str(msd), "--out", str(out)]) == 0

    found = json.loads(capsys.readouterr().out)
    recipe = FinetuneRecipe(
        channels=tuple(found["channels"]),
        labels=found["labels"],
        preprocessing=Preprocessing(intensity=ZScore()),
        patch_size=(16, 16, 16),
    )
    scans = discover(Path(found["scans"]), channels=recipe.channels, shares=recipe.split)
    case = VolumeCache(tmp_path / "cache").labelled(scans.of("train")[0], recipe)
    assert scans.digest == found["digest"]
    assert found["num_scans"] == {"train": 7, "val": 1, "test": 3}  # 2 labelled and the given one
    assert len(case.channels) == 2 and set(np.unique(case.labels)) <= {0, 1, 2}
    with (out / "files.csv").open(newline="") as file:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons["readme.txt"] == "not part of this layout"
    assert reasons["imagesTr/prostate_00.nii.gz"] == ""


def test_a_list_that_is_made_again_is_the_same_and_writes_no_channel_twice(
    msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["dataset", "msd", str(msd), "--out", str(tmp_path / "out"), "--channel", "adc"]
    main(arguments)
    first = json.loads(capsys.readouterr().out)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/channels").iterdir()}

    main(arguments)

    assert json.loads(capsys.readouterr().out) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out/channels").iterdir()} == written
    assert len(written) == 11
    main([*arguments, "--seed", "1"])
    assert json.loads(capsys.readouterr().out)["digest"] != first["digest"]


def test_a_folder_of_something_else_ends_with_status_64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["dataset", "luna16", str(tmp_path), "--out", str(tmp_path / "out")])

    assert status == 64
    assert "bad_dataset: not_this_layout" in capsys.readouterr().err


def test_a_training_reads_a_metaimage_header_with_the_voxels_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "luna" / "subset0"
    folder.mkdir(parents=True)
    voxels = RANDOM.integers(-900, 500, (20, 21, 22)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), folder / "1.2.3.mhd")
    table = "seriesuid,coordX,coordY,coordZ,class\n1.2.3,4,5,6,1\n"
    (folder.parent / "candidates_V2.csv").write_text(table)

    main(["dataset", "luna16", str(folder.parent), "--out", str(tmp_path / "out")])

    scan = discover(tmp_path / "out" / "scans.json").scans[0]
    case = VolumeCache(tmp_path / "cache").image(scan, Preprocessing())
    assert case.image.shape == (22, 21, 20)
    assert scan.examples[0].centre_mm == (-4.0, -5.0, 6.0)
    before = digest_of(scan.image)
    raw = folder / "1.2.3.raw"
    raw.write_bytes(raw.read_bytes()[::-1])
    assert digest_of(scan.image) != before
    volume = read_scan(scan.image, kind="image", beside=raw).volume
    assert volume.shape == (22, 21, 20)
