"""Public data sets in their makers' layouts: what is imported, and that nothing is left unsaid."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its usual name
from PIL import Image as Pillow

from imaging.datasets import LayoutError, Options, Plan, read_layout
from imaging.datasets.channels import extract
from imaging.datasets.plan import files_of
from imaging.datasets.shipping import as_one_file
from imaging.errors import ScanError
from imaging.intake import read_scan
from imaging.nifti import read

RANDOM = np.random.default_rng(7)


def nifti(path: Path, voxels: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if voxels is None:
        voxels = RANDOM.integers(0, 3, (4, 5, 6), dtype=np.int16)
    nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])).to_filename(path)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(RANDOM.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)


def text(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def plan_of(kind: str, folder: Path, options: Options | None = None) -> Plan:
    """The plan, after the promise that holds for every layout: no file without an end."""
    plan = read_layout(kind, folder, options or Options())
    there = {path for path in folder.rglob("*") if path.is_file()}
    of_cases = {
        file
        for case in plan.cases
        for image in (*case.images, *([case.labels] if case.labels else []))
        for file in files_of(image)
    }
    assert plan.consumed | plan.explained.keys() == there
    assert not plan.consumed & plan.explained.keys()
    assert of_cases <= plan.consumed
    assert all(plan.explained.values())
    return plan


def why(plan: Plan) -> dict[str, str]:
    return {path.name: reason for path, reason in plan.explained.items()}


# LUNA16

SERIES = ("1.3.6.1.4.1.1", "1.3.6.1.4.1.2", "1.3.6.1.4.1.3")


@pytest.fixture
def luna(tmp_path: Path) -> Path:
    for series, subset in zip(SERIES, (0, 8, 9), strict=True):
        image = sitk.GetImageFromArray(RANDOM.integers(-1000, 400, (5, 6, 7)).astype(np.int16))
        image.SetSpacing((0.7, 0.7, 1.25))
        image.SetOrigin((-190.5, -170.25, -300.0))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1) if subset == 9 else np.eye(3).ravel())
        target = tmp_path / f"subset{subset}" / f"{series}.mhd"
        target.parent.mkdir(exist_ok=True)
        sitk.WriteImage(image, target, useCompression=subset == 8)
    table(
        tmp_path / "candidates_V2.csv",
        [
            ["seriesuid", "coordX", "coordY", "coordZ", "class"],
            [SERIES[0], -56.08, 67.85, -311.92, 0],
            [SERIES[0], 53.21, -244.41, -245.17, 1],
            [SERIES[2], 1, 2, 3, 0],
            ["1.3.6.1.4.1.99", 1, 2, 3, 0],
        ],
    )
    text(tmp_path / "annotations.csv", "seriesuid,coordX\n")
    text(tmp_path / "seg-lungs-LUNA16" / f"{SERIES[0]}.mhd")
    text(tmp_path / "read me.pdf")
    text(tmp_path / "._candidates_V2.csv")
    return tmp_path


def test_luna_gives_scans_by_subset_and_candidates_in_ras(luna: Path) -> None:
    plan = plan_of("luna16", luna)

    assert [case.id for case in plan.cases] == list(SERIES)
    assert [case.split for case in plan.cases] == ["train", "val", "test"]
    assert plan.classes == ("nodule",)
    assert [(f.classes["nodule"], f.centre_mm) for f in plan.cases[0].findings] == [
        (0, (56.08, -67.85, -311.92)),
        (1, (-53.21, 244.41, -245.17)),
    ]
    assert plan.cases[1].findings == ()
    assert plan.notes == ("candidates of 1 scans that are not here are not used",)
    assert why(plan)["read me.pdf"] == "not part of this layout"
    assert why(plan)["._candidates_V2.csv"] == "a hidden file"


def test_a_candidate_lies_at_the_voxel_that_simpleitk_finds_there(luna: Path) -> None:
    """LPS places of the table and RAS+ affines of our reader meet in one voxel."""
    case = plan_of("luna16", luna).cases[2]
    oracle = sitk.ReadImage(case.images[0].path)
    index = (3, 2, 4)
    lps = oracle.TransformIndexToPhysicalPoint(index)
    row = [case.id, *lps, 1]
    table(luna / "candidates_V2.csv", [["seriesuid", "coordX", "coordY", "coordZ", "class"], row])

    case = plan_of("luna16", luna).cases[2]
    volume = read_scan(case.images[0].path, kind="image", beside=case.images[0].voxels).volume

    assert case.findings[0].centre_mm is not None
    place = np.linalg.inv(volume.affine) @ [*case.findings[0].centre_mm, 1.0]
    i, j, k = np.rint(place[:3]).astype(int)
    assert np.allclose(place[:3], (i, j, k), atol=1e-6)
    assert volume.voxels[i, j, k] == oracle.GetPixel(index)


@pytest.mark.parametrize("at", [0, 1])
def test_a_metaimage_pair_is_sent_as_one_file_of_the_same_bytes_each_time(
    luna: Path, at: int
) -> None:
    image = plan_of("luna16", luna).cases[at].images[0]
    digests = []
    for _ in range(2):
        with as_one_file(image) as path:
            digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
            volume = read_scan(path, kind="image").volume

    expected = sitk.GetArrayFromImage(sitk.ReadImage(image.path)).transpose(2, 1, 0)
    assert digests[0] == digests[1]
    assert np.array_equal(volume.voxels, expected[::-1, ::-1])  # LPS axes as RAS+


def test_a_header_without_its_voxels_is_named(luna: Path) -> None:
    (luna / "subset0" / f"{SERIES[0]}.raw").unlink()

    with pytest.raises(LayoutError, match=rf"file_missing: .*{SERIES[0]}\.mhd"):
        read_layout("luna16", luna)


# LiTS


def test_lits_pairs_volumes_with_segmentations_wherever_the_mirror_put_them(
    tmp_path: Path,
) -> None:
    nifti(tmp_path / "Training Batch 1" / "volume-0.nii")
    nifti(tmp_path / "Training Batch 1" / "segmentation-0.nii")
    nifti(tmp_path / "volume_pt2" / "volume-10.nii.gz")
    nifti(tmp_path / "segmentations" / "segmentation-10.nii.gz")
    nifti(tmp_path / "test" / "test-volume-0.nii")
    text(tmp_path / "lits_train.csv")

    plan = plan_of("lits", tmp_path)

    assert [(case.id, case.split) for case in plan.cases] == [
        ("volume-0", None), ("test-volume-0", "test"), ("volume-10", None),
    ]  # fmt: skip
    assert [case.labels.path.name if case.labels else None for case in plan.cases] == [
        "segmentation-0.nii", None, "segmentation-10.nii.gz",
    ]  # fmt: skip
    assert len({case.patient for case in plan.cases}) == 3
    assert plan.labels == {"liver": 1, "tumour": 2}
    assert not plan.has_test


def test_a_segmentation_without_its_volume_is_refused(tmp_path: Path) -> None:
    nifti(tmp_path / "volume-0.nii")
    nifti(tmp_path / "segmentation-3.nii")

    with pytest.raises(LayoutError, match="file_missing: segmentation-3"):
        read_layout("lits", tmp_path)


# MSD


def msd(folder: Path, **changed: object) -> Path:
    voxels = RANDOM.integers(0, 900, (4, 5, 6, 2), dtype=np.int16)
    nifti(folder / "imagesTr" / "prostate_00.nii.gz", voxels)
    nifti(folder / "labelsTr" / "prostate_00.nii.gz")
    nifti(folder / "imagesTs" / "prostate_03.nii.gz", voxels)
    text(folder / "imagesTr" / "._prostate_00.nii.gz")
    described = {
        "name": "PROSTATE",
        "tensorImageSize": "4D",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "numTraining": 1,
        "training": [
            {"image": "./imagesTr/prostate_00.nii.gz", "label": "./labelsTr/prostate_00.nii.gz"}
        ],
        "test": ["./imagesTs/prostate_03.nii.gz"],
    }
    text(folder / "dataset.json", json.dumps({**described, **changed}))
    return folder


def test_msd_reads_dataset_json_and_splits_4d_files_into_channels(tmp_path: Path) -> None:
    plan = plan_of("msd", msd(tmp_path))

    trained, tested = plan.cases
    assert (plan.channels, plan.labels) == (("t2", "adc"), {"pz": 1, "tz": 2})
    assert [image.channel for image in trained.images] == [0, 1]
    assert (tested.split, tested.labels) == ("test", None)
    stored = nib.Nifti1Image.from_filename(trained.images[0].path)
    for image in trained.images:
        assert image.channel is not None
        extract(image.path, image.channel, tmp_path / "one.nii.gz")
        volume, grid = read(tmp_path / "one.nii.gz")
        assert np.array_equal(volume.voxels, np.asanyarray(stored.dataobj)[..., image.channel])
        assert np.array_equal(grid.affine, stored.affine)


def test_values_of_a_channel_are_scaled_as_the_header_says(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 9, (4, 5, 6, 3)).astype(np.int16)
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    image.to_filename(tmp_path / "a.nii")
    expected = np.asanyarray(nib.Nifti1Image.from_filename(tmp_path / "a.nii").dataobj)

    extract(tmp_path / "a.nii", 2, tmp_path / "b.nii")

    assert np.allclose(read(tmp_path / "b.nii")[0].voxels, expected[..., 2])


@pytest.mark.parametrize("channel", [-1, 3, 1000])
def test_a_channel_that_is_not_there_is_refused(tmp_path: Path, channel: int) -> None:
    nifti(tmp_path / "a.nii", np.zeros((4, 5, 6, 3), np.int16))

    with pytest.raises(ScanError, match="not_three_dimensional"):
        extract(tmp_path / "a.nii", channel, tmp_path / "b.nii")

    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


def test_a_4d_file_that_lies_about_its_size_costs_no_memory(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", np.zeros((4, 5, 6, 3), np.int16))
    data = bytearray((tmp_path / "a.nii").read_bytes())
    data[42:48] = np.array([8000, 8000, 8], "<i2").tobytes()  # dim[1..3]
    (tmp_path / "a.nii").write_bytes(data)

    with pytest.raises(ScanError, match="truncated_file"):
        extract(tmp_path / "a.nii", 2, tmp_path / "b.nii")


def test_one_channel_of_msd_can_be_asked_for(tmp_path: Path) -> None:
    plan = plan_of("msd", msd(tmp_path), Options(channel="adc"))

    assert plan.channels == ("adc",)
    assert [image.channel for case in plan.cases for image in case.images] == [1, 1]
    with pytest.raises(LayoutError, match=r"no_such_channel: .* there are t2, adc"):
        read_layout("msd", tmp_path, Options(channel="flair"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"training": [{"image": "../../etc/passwd", "label": "x"}]}, "file_missing"),
        ({"training": [{"image": "/etc/passwd", "label": "x"}]}, "file_missing"),
        ({"modality": {}}, "bad_table: dataset.json: modality"),
        ({"modality": {"0": "T2", "1": "t2"}}, "bad_table: .* alike"),
        (
            {"labels": {"0": "background", "1": "Tumor", "2": "tumor!"}},
            "bad_table: .* alike: tumor",
        ),
        ({"labels": {"1": f"{'a' * 32}_left", "2": f"{'a' * 32}_right"}}, "bad_table: .* alike"),
        ({"training": [], "test": []}, "not_this_layout"),
    ],
)
def test_a_dataset_json_that_cannot_be_right_is_refused(
    tmp_path: Path, changed: dict[str, object], reason: str
) -> None:
    with pytest.raises(LayoutError, match=reason):
        read_layout("msd", msd(tmp_path, **changed))


# nnU-Net


def nnunet(folder: Path, described: dict[str, object], num_channels: int = 2) -> Path:
    for which, case in (("Tr", "la_003"), ("Tr", "la_004"), ("Ts", "la_009")):
        for at in range(num_channels):
            nifti(folder / f"images{which}" / f"{case}_{at:04d}.nii.gz")
        nifti(folder / f"labels{which}" / f"{case}.nii.gz")
    text(folder / "dataset.json", json.dumps(described))
    return folder


V2 = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "Left Atrium": 1, "ignore": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
V1 = {
    "modality": {"0": "CT", "1": "PET"},
    "labels": {"0": "background", "1": "Left Atrium"},
    "training": [{"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"}],
}


@pytest.mark.parametrize("described", [V1, V2], ids=["v1", "v2"])
def test_nnunet_reads_channels_by_number_in_both_versions(
    tmp_path: Path, described: dict[str, object]
) -> None:
    plan = plan_of("nnunet", nnunet(tmp_path, described))

    assert (plan.channels, plan.labels) == (("ct", "pet"), {"left_atrium": 1})
    assert [(case.id, case.split) for case in plan.cases] == [
        ("la_003", None), ("la_004", None), ("la_009", "test"),
    ]  # fmt: skip
    assert [image.path.name for image in plan.cases[0].images] == [
        "la_003_0000.nii.gz", "la_003_0001.nii.gz",
    ]  # fmt: skip
    assert plan.has_test
    assert bool(plan.notes) == (described is V2)


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "Tumor": 1, "tumor ": 2},
        {"0": "background", "1": "Tumor", "2": "tumor"},
        {"background": 0, "Whole": [1, 2], "whole": [2]},
        {"background": 0, "Whole": [1, 2], "whole": 2},
    ],
)
def test_nnunet_labels_that_would_become_one_are_refused(
    tmp_path: Path, labels: dict[str, object]
) -> None:
    with pytest.raises(LayoutError, match=r"bad_table: labels .* alike: (tumor|whole)"):
        read_layout("nnunet", nnunet(tmp_path, {**V2, "labels": labels}))


def test_nnunet_regions_are_unions_of_values(tmp_path: Path) -> None:
    labels = {"background": 0, "whole tumor": [1, 2], "core": 2}
    plan = plan_of("nnunet", nnunet(tmp_path, {**V2, "labels": labels}))

    assert plan.labels == {}
    assert plan.regions == {"whole_tumor": (1, 2), "core": (2,)}


def test_a_case_that_lacks_a_channel_is_refused_by_name(tmp_path: Path) -> None:
    nnunet(tmp_path, V2)
    (tmp_path / "imagesTr" / "la_004_0001.nii.gz").unlink()

    with pytest.raises(LayoutError, match=r"file_missing: case la_004 has channels \[0\]"):
        read_layout("nnunet", tmp_path)


def test_an_nnunet_data_set_of_2d_images_is_refused_by_name(tmp_path: Path) -> None:
    text(tmp_path / "dataset.json", json.dumps({**V2, "file_ending": ".png"}))

    with pytest.raises(LayoutError, match=r"not_this_layout: file_ending is '\.png'"):
        read_layout("nnunet", tmp_path)


# BraTS

LAYOUTS = {
    "2018": ("HGG/Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_{}.nii.gz",
             "LGG/Brats18_TCIA09_620_1/Brats18_TCIA09_620_1_{}.nii.gz"),
    "2020": ("BraTS20_Training_001/BraTS20_Training_001_{}.nii",
             "BraTS20_Training_002/BraTS20_Training_002_{}.nii"),
    "2023": ("BraTS-GLI-00002-000/BraTS-GLI-00002-000-{}.nii.gz",
             "BraTS-GLI-00002-001/BraTS-GLI-00002-001-{}.nii.gz"),
}  # fmt: skip
NAMES = {"2023": ("t2f", "t1n", "t1c", "t2w"), "": ("flair", "t1", "t1ce", "t2")}


@pytest.mark.parametrize("year", LAYOUTS)
def test_brats_gives_four_channels_in_one_order_in_every_years_layout(
    tmp_path: Path, year: str
) -> None:
    names = NAMES.get(year, NAMES[""])
    for pattern in LAYOUTS[year]:
        for name in (*names, "seg"):
            nifti(tmp_path / pattern.format(name))
    text(tmp_path / "survival_data.csv")

    plan = plan_of("brats", tmp_path)

    assert plan.channels == ("flair", "t1", "t1c", "t2")
    for case in plan.cases:
        suffixes = [re.split("[_-]", image.path.name.split(".")[0])[-1] for image in case.images]
        assert suffixes == list(names)
        assert case.labels is not None
    enhancing = 3 if year == "2023" else 4
    assert plan.regions["whole_tumour"] == (1, 2, enhancing)
    assert plan.regions["core"] == (1, enhancing) and plan.regions["enhancing"] == (enhancing,)
    num_patients = 1 if year == "2023" else 2  # two time points of one patient
    assert len({case.patient for case in plan.cases}) == num_patients
    assert plan.explained[tmp_path / "survival_data.csv"] == "survival is not imported"


def test_a_brats_case_that_lacks_a_modality_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("flair", "t1", "t2"):
        nifti(tmp_path / f"A_1/A_1_{name}.nii.gz")

    with pytest.raises(LayoutError, match="file_missing: case A_1 has no t1c"):
        read_layout("brats", tmp_path)


# Chest14


def chest14(folder: Path, findings: str = "Cardiomegaly|Pleural_Thickening") -> Path:
    table(
        folder / "Data_Entry_2017.csv",
        [
            ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "View"],
            ["00000001_000.png", findings, 0, 1, 58, "PA"],
            ["00000001_001.png", "No Finding", 1, 1, 58, "PA"],
            ["00000002_000.png", "Hernia", 0, 2, 81, "AP"],
            ["00000003_000.png", "Hernia", 0, 3, 81, "AP"],
        ],
    )
    picture(folder / "images_001" / "images" / "00000001_000.png")
    picture(folder / "images_001" / "images" / "00000001_001.png")
    picture(folder / "images_002" / "images" / "00000002_000.png")
    picture(folder / "images_002" / "images" / "00009999_000.png")
    text(folder / "train_val_list.txt", "00000001_000.png\n00000001_001.png\n")
    text(folder / "test_list.txt", "00000002_000.png\n00000003_000.png")
    text(folder / "BBox_List_2017.csv")
    return folder


def test_chest14_gives_findings_by_image_and_the_official_test_list(tmp_path: Path) -> None:
    plan = plan_of("chest14", chest14(tmp_path))

    first, second, third = plan.cases
    assert (plan.dims, len(plan.classes)) == (2, 14)
    assert [case.split for case in plan.cases] == [None, None, "test"]
    assert first.patient == second.patient != third.patient
    known = first.findings[0].classes
    assert {name for name, value in known.items() if value} == {
        "cardiomegaly", "pleural_thickening",
    }  # fmt: skip
    assert set(known) == set(plan.classes)
    assert not any(second.findings[0].classes.values())
    assert plan.notes == ("1 images of Data_Entry_2017.csv are not here",)
    assert "does not name it" in why(plan)["00009999_000.png"]
    assert plan.has_test


@pytest.mark.parametrize("findings", ["Cardiomegaly|Measles", "No Finding|Hernia", ""])
def test_findings_that_cannot_be_right_are_refused_with_their_line(
    tmp_path: Path, findings: str
) -> None:
    with pytest.raises(LayoutError, match=r"bad_table: Data_Entry_2017\.csv, line 2"):
        read_layout("chest14", chest14(tmp_path, findings))


def test_a_patient_in_both_lists_is_refused(tmp_path: Path) -> None:
    chest14(tmp_path)
    cells = (tmp_path / "Data_Entry_2017.csv").read_text().replace("No Finding,1,1", "Hernia,1,2")
    (tmp_path / "Data_Entry_2017.csv").write_text(cells)
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n")

    plan = plan_of("chest14", tmp_path)  # an image in no list is left open
    (tmp_path / "train_val_list.txt").write_text("00000002_000.png\n")

    assert plan.cases[1].split is None
    with pytest.raises(LayoutError, match="stands in both lists"):
        read_layout("chest14", tmp_path)


# CheXpert


@pytest.fixture
def chexpert(tmp_path: Path) -> Path:
    names = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity",
             "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
             "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices"]  # fmt: skip
    head = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *names]
    start = "CheXpert-v1.0-small"
    blank = [""] * 11

    def row(split: str, name: str, view: str, *cells: object) -> list[object]:
        picture(tmp_path / split / f"{name}.jpg")
        return [f"{start}/{split}/{name}.jpg", "Female", 68, view, "AP", *cells, *blank]

    table(tmp_path / "train.csv", [
        head,
        row("train", "patient00001/study1/view1_frontal", "Frontal", "1.0", "0.0", "-1.0"),
        row("train", "patient00001/study1/view2_lateral", "Lateral", "1.0", "", ""),
    ])  # fmt: skip
    table(tmp_path / "valid.csv", [
        head,
        row("valid", "patient64541/study1/view1_frontal", "Frontal", "0.0", "0.0", "1.0"),
    ])  # fmt: skip
    return tmp_path


@pytest.mark.parametrize(("uncertain", "expected"), [("ignore", None), ("zeros", 0), ("ones", 1)])
def test_what_is_uncertain_becomes_what_was_asked_for(
    chexpert: Path, uncertain: str, expected: int | None
) -> None:
    plan = plan_of("chexpert", chexpert, Options(uncertain=uncertain))  # type: ignore[arg-type]

    classes = plan.cases[0].findings[0].classes
    assert classes.get("cardiomegaly") == expected
    assert (classes["no_finding"], classes["enlarged_cardiomediastinum"]) == (1, 0)
    assert classes["support_devices"] == 0  # not mentioned
    assert f"uncertain: {uncertain}" in plan.notes[0]


def test_what_is_not_mentioned_can_be_left_unknown(chexpert: Path) -> None:
    plan = plan_of("chexpert", chexpert, Options(unmentioned="ignore"))

    assert set(plan.cases[0].findings[0].classes) == {"no_finding", "enlarged_cardiomediastinum"}


def test_chexpert_gives_the_views_asked_for_with_their_split(chexpert: Path) -> None:
    frontal = plan_of("chexpert", chexpert)
    both = plan_of("chexpert", chexpert, Options(views="all"))
    above = read_layout("chexpert", chexpert)

    assert [(case.id, case.split) for case in frontal.cases] == [
        ("patient00001_study1_view1_frontal", "train"),
        ("patient64541_study1_view1_frontal", "val"),
    ]
    assert len(both.cases) == 3 and both.cases[0].patient == both.cases[1].patient
    assert why(frontal)["view2_lateral.jpg"] == "the views asked for are frontal"
    assert above.cases == frontal.cases


def test_chexpert_may_lie_below_the_folder(tmp_path: Path, chexpert: Path) -> None:
    plan = read_layout("chexpert", chexpert)
    moved = tmp_path / "moved" / "CheXpert-v1.0-small"
    moved.mkdir(parents=True)
    for name in ("train", "valid", "train.csv", "valid.csv"):
        (chexpert / name).rename(moved / name)

    below = plan_of("chexpert", moved.parent)

    assert [case.id for case in below.cases] == [case.id for case in plan.cases]


# All


@pytest.mark.parametrize(
    "kind", ["luna16", "lits", "msd", "nnunet", "brats", "chest14", "chexpert"]
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, kind: str) -> None:
    text(tmp_path / "letter.txt")

    with pytest.raises(LayoutError, match="not_this_layout"):
        read_layout(kind, tmp_path)
    with pytest.raises(LayoutError, match="not_this_layout"):
        read_layout(kind, tmp_path / "absent")


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    nifti(tmp_path / "volume-0.nii")
    (tmp_path / "again").symlink_to(tmp_path)

    assert len(read_layout("lits", tmp_path).cases) == 1
