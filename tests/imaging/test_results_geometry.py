"""A corner stays in its corner: DICOM -> volume -> mask -> DICOM SEG, RTSTRUCT -> and back."""

from __future__ import annotations

import itertools
import subprocess

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation

from imaging.dicom_header import quiet
from imaging.intake import read_scan
from imaging.results import readback
from imaging.results.source import read_source
from imaging.volume import Grid

SHAPE = (7, 9, 5)
SPACING = (0.8, 1.3, 2.7)


def all_48() -> list[np.ndarray]:
    """Every order and direction of the axes, as affines (C, R, S) to RAS+."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = np.eye(3)[:, order] * signs * SPACING
            affine[:3, 3] = (-31.5, 12.25, -407.75)
            found.append(affine)
    return found


def obliques(number: int) -> list[np.ndarray]:
    found = []
    for turn, sign in zip(Rotation.random(number, rng=1).as_matrix(), itertools.cycle((1, -1))):
        affine = np.eye(4)
        affine[:3, :3] = turn * SPACING * [1, 1, sign * np.linalg.det(turn)]
        affine[:3, 3] = (101.3, -55.7, 18.1)
        found.append(affine)
    return found


def corners(seed: int = 0) -> np.ndarray:
    """Labels (C, R, S): the first corner is 2, another one 1, and a few more inside."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[np.random.default_rng(seed).random(SHAPE) > 0.8] = 1
    labels[0, 0, 0], labels[-1, 0, 0], labels[0, -1, -1] = 2, 1, 0
    return labels


def sop_uids(files) -> list[str]:
    return [str(pydicom.dcmread(file).SOPInstanceUID) for file in files]


def highdicom_reads(path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and their affine to RAS+, by highdicom's own reader."""
    with quiet():
        volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
    return volume.array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine


def by_day_and_night(name: str, affines) -> list:
    """Every second one by day."""
    night = pytest.mark.nightly
    return [
        pytest.param(affine, id=f"{name}{number}", marks=[night] * (number % 2))
        for number, affine in enumerate(affines)
    ]


@pytest.mark.parametrize(
    "affine", by_day_and_night("axes", all_48()) + by_day_and_night("oblique", obliques(12))
)
def test_a_corner_stays_in_its_corner(series, tmp_path, affine):
    labels = corners()
    series.write_series(labels.astype(np.int16) * 100, affine, tmp_path / "in")

    made = series.results_of(
        tmp_path / "in", lambda volume: np.rint(volume.voxels / 100), tmp_path / "out"
    )

    array, its_affine = highdicom_reads(tmp_path / "out/seg.dcm")
    points = series.grid_points(array.shape, its_affine)
    assert np.array_equal(series.at_world(labels, affine, points), array.ravel())
    first = its_affine @ [*np.argwhere(array == 2)[0], 1]
    assert np.allclose(first[:3], affine[:3, 3], atol=1e-4)
    for one in made["files"]:
        if one["format"] != "dicom-sr":
            assert one["certificate"]["max_corner_error_mm"] < 1e-3
            assert one["certificate"]["voxels"]["tumour"] == 1
    assert made["not_made"] == []


@pytest.mark.parametrize("number", [0, 17, 31, 47])
def test_dcmqi_finds_every_voxel_where_the_scan_has_it(series, tmp_path, number):
    affine, labels = all_48()[number], corners()
    series.write_series(labels.astype(np.int16) * 100, affine, tmp_path / "in")
    series.results_of(tmp_path / "in", lambda v: np.rint(v.voxels / 100), tmp_path / "out")

    read = series.dcmqi_reads(tmp_path / "out/seg.dcm", tmp_path)

    array = np.asarray(read.dataobj).astype(np.uint8)
    assert array.shape == SHAPE or sorted(array.shape) == sorted(SHAPE)
    assert np.array_equal(
        series.at_world(labels, affine, series.grid_points(array.shape, read.affine)), array.ravel()
    )


def test_dcmqi_reads_the_volumes_of_the_report(series, small_zip, tmp_path):
    import json

    series.results_of(small_zip, series.boxes, tmp_path)
    out = tmp_path / "report.json"
    subprocess.run(
        [
            *(series.need("tid1500reader"), "--inputDICOM", str(tmp_path / "sr.dcm")),
            *("--outputMetadata", str(out)),
        ],
        check=True,
        capture_output=True,
    )

    first, second = json.loads(out.read_text())["Measurements"]
    seg = pydicom.dcmread(tmp_path / "seg.dcm")

    facts = series.facts_of(read_mask(tmp_path))
    for group, label, number in zip((first, second), facts.labels, (1, 2), strict=True):
        (item,) = group["measurementItems"]
        assert float(item["value"]) == pytest.approx(label.volume_ml)
        assert item["units"]["CodeValue"] == "ml"
        assert group["ReferencedSegment"] == number
        assert group["segmentationSOPInstanceUID"] == seg.SOPInstanceUID


def read_mask(folder) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_filename(folder / "mask.nii.gz").dataobj)


def test_a_mask_on_another_grid_lands_on_the_slices_by_the_nearest_voxel(series, tmp_path):
    """As for a tilted or uneven series, whose volume was resampled."""
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    files = series.write_series(np.zeros((12, 10, 6), np.int16), affine, tmp_path / "in")
    fine = affine.copy()
    fine[:3, 2] /= 3
    mask = np.zeros((12, 10, 16), dtype=np.uint8)
    mask[2:5, 3:6, 5:9] = 1  # centred on the second and third slice at 3.0 and 6.0 mm
    mask[9, 9, 15] = 2
    grid = Grid((12, 10, 16), fine)

    with quiet():
        source = read_source(
            tmp_path / "in", pydicom.dcmread(files[0]).SeriesInstanceUID, grid, sop_uids(files)
        )
    slices = source.slices_of(mask)

    assert source.mapping == "nearest"
    assert len(slices) == 6
    filled = [s for s in range(6) if (slices[s] == 1).any()]
    positions = [source.planes[s].affine[2, 3] for s in filled]
    assert np.allclose(positions, [6.0]), "5 to 8 mm: only the slice at 6 mm"
    assert np.argwhere(slices[filled[0]] == 1).min(axis=0).tolist() == [3, 2]
    assert (slices == 2).sum() == 1


def test_a_nearest_result_is_certified_and_a_wrong_one_is_not(series, tmp_path):
    from imaging.results.segmentation import write_segmentation

    files = series.write_series(np.zeros((12, 10, 6), np.int16), np.diag([2, 2, 3, 1.0]), tmp_path)
    fine = Grid((12, 10, 16), np.diag([2.0, 2.0, 1.0, 1.0]))
    mask = np.zeros(fine.shape, dtype=np.uint8)
    mask[2:5, 3:6, 5:9], mask[9, 9, 15] = 1, 2
    uid = pydicom.dcmread(files[0]).SeriesInstanceUID
    out = tmp_path / "seg.dcm"
    with quiet():
        source = read_source(tmp_path, uid, fine, sop_uids(files))
        write_segmentation(out, source, mask, series.facts_of(mask))

    proven = readback.certify_segmentation(out, source, mask, series.NAMES)
    with pytest.raises(readback.GeometryError, match="differ"):
        readback.certify_segmentation(out, source, mask[::-1], series.NAMES)

    assert proven.mapping == "nearest"
    assert proven.voxels == {"liver": 9, "tumour": 1}


def test_a_copy_of_a_slice_does_not_make_a_second_frame(series, tmp_path):
    files = series.write_series(corners().astype(np.int16), all_48()[0], tmp_path / "in")
    (tmp_path / "in/again").write_bytes(files[2].read_bytes())

    scan = read_scan(tmp_path / "in", kind="image")
    with quiet():
        source = read_source(
            tmp_path / "in", scan.series_uid, scan.source, [one.sop_uid for one in scan.used]
        )

    assert len(source.images) == len(files)
    assert source.mapping == "identity"
