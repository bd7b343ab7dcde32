"""`pcrl dataset import`: a public data set in its own layout, into a real service."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its usual name
from PIL import Image
from typer.testing import CliRunner

from imaging.datasets import read_layout
from service import dataset_import
from service.cli import app
from service.client import Client
from service.dataset_import import send, subject_of

RANDOM = np.random.default_rng(3)


def nifti(path: Path, voxels: np.ndarray, spacing_mm: float = 2.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    nib.Nifti1Image(voxels, affine).to_filename(path)


@pytest.fixture
def lits(tmp_path: Path) -> Path:
    folder = tmp_path / "lits"
    for number in range(3):
        nifti(folder / f"volume-{number}.nii", RANDOM.integers(-100, 200, (6, 7, 8)).astype("i2"))
        nifti(folder / f"segmentation-{number}.nii", RANDOM.integers(0, 3, (6, 7, 8)).astype("u1"))
    nifti(folder / "test-volume-0.nii.gz", RANDOM.integers(-100, 200, (6, 7, 8)).astype("i2"))
    (folder / "paper.pdf").write_bytes(b"%PDF")
    return folder


@pytest.fixture
def pcrl(api, url):
    def run(*arguments: object, status: int = 0) -> str:
        runner = CliRunner(env={"PCRL_URL": url, "PCRL_TOKEN": api.tokens["admin"]})
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result.output

    return run


def test_a_folder_becomes_a_dataset_with_labels_and_patients(api, url, pcrl, lits):
    output = pcrl("dataset", "import", "lits", lits, "--name", "LiTS")

    with Client(url, api.tokens["admin"]) as client:
        made = client.dataset(output.split()[-1])
        volumes = {item.subject: client.volume(item.volume_id) for item in made.items}
    assert "1 files not used: not part of this layout" in output
    assert made.name == "LiTS"
    assert {item.subject: item.labels_id is not None for item in made.items} == {
        "lits-0": True, "lits-1": True, "lits-2": True, "lits-test-0": False,
    }  # fmt: skip
    split_of = {item.subject: item.split for item in made.items}
    assert split_of["lits-test-0"] == "test"
    assert {split_of[f"lits-{number}"] for number in range(3)} >= {"train", "val"}
    assert list(volumes["lits-0"].shape) == [6, 7, 8]


def test_an_import_that_is_repeated_stores_nothing_twice(api, url, pcrl, lits):
    pcrl("dataset", "import", "lits", lits)
    with Client(url, api.tokens["admin"]) as client:
        before = client.volumes()

        output = pcrl("dataset", "import", "lits", lits)

        assert client.volumes() == before
        digests = {client.dataset(one.id).digest for one in client.datasets() if one.name == "lits"}
    assert len(digests) == 1 and output.split()[-1].startswith("ds_")


def test_a_metaimage_pair_arrives_where_its_header_says(api, url, tmp_path):
    image = sitk.GetImageFromArray(RANDOM.integers(-900, 100, (5, 6, 7)).astype(np.int16))
    image.SetOrigin((10, 20, 30))
    (tmp_path / "subset3").mkdir()
    sitk.WriteImage(image, tmp_path / "subset3" / "1.2.840.3.mhd")
    plan = read_layout("luna16", tmp_path)

    with Client(url, api.tokens["admin"]) as client:
        sent = [send(client, plan) for _ in range(2)]
        volume = client.volume(sent[0].items[0][0])

    assert sent[0] == sent[1] and not sent[0].refused
    assert sent[0].items[0][1:] == (None, "train", None)
    assert volume.format == "metaimage" and list(volume.shape) == [7, 6, 5]
    corner = np.array(volume.affine) @ [6, 5, 0, 1]  # the first voxel of the file, in RAS+
    assert np.allclose(corner[:3], (-10, -20, 30))


def test_one_channel_of_a_4d_file_is_sent_when_it_is_asked_for(pcrl, api, url, tmp_path):
    nifti(tmp_path / "imagesTr/a.nii.gz", RANDOM.integers(0, 99, (6, 7, 8, 2)).astype("i2"))
    nifti(tmp_path / "labelsTr/a.nii.gz", np.ones((6, 7, 8), "u1"))
    described = {
        "modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "PZ"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(described))

    refusal = pcrl("dataset", "import", "msd", tmp_path, status=65)
    output = pcrl("dataset", "import", "msd", tmp_path, "--channel", "adc")

    assert "not_held" in refusal and "these have t2, adc" in refusal
    with Client(url, api.tokens["admin"]) as client:
        made = client.dataset(output.split()[-1])
        client.download_volume(made.items[0].volume_id, tmp_path / "back.nii")
    back = nib.Nifti1Image.from_filename(tmp_path / "back.nii")
    sent = nib.Nifti1Image.from_filename(tmp_path / "imagesTr/a.nii.gz")
    assert np.array_equal(back.get_fdata(), sent.get_fdata()[..., 1])


@pytest.fixture
def chest14(tmp_path: Path) -> Path:
    """Three films of two patients."""
    folder = tmp_path / "chest14"
    folder.mkdir()
    rows = ["a.png,Mass|Nodule,1", "b.png,Effusion,1", "c.png,No Finding,2"]
    table = "\n".join(["Image Index,Finding Labels,Patient ID", *rows, ""])
    (folder / "Data_Entry_2017.csv").write_text(table)
    for name in "abc":
        Image.fromarray(RANDOM.integers(0, 255, (20, 24), "u1")).save(folder / f"{name}.png")
    return folder


def test_films_become_a_dataset_with_classes_and_patients(pcrl, api, url, chest14):
    output = pcrl("dataset", "import", "chest14", chest14)

    with Client(url, api.tokens["admin"]) as client:
        made = client.dataset(output.split()[-1])
        volume = client.volume(made.items[0].volume_id)
    assert (volume.kind, volume.shape, volume.affine) == ("image_2d", (20, 24), None)
    assert [item.subject for item in made.items] == ["chest14-1", "chest14-1", "chest14-2"]
    present = [{name for name, value in item.classes.items() if value} for item in made.items]
    assert present == [{"mass", "nodule"}, {"effusion"}, set()]
    assert len(made.items[2].classes) == 14  # the control: what is absent is known to be


def test_more_scans_than_a_dataset_has_are_refused_before_anything_is_sent(
    pcrl, chest14, monkeypatch
):
    monkeypatch.setattr(dataset_import, "MAX_ITEMS", 2)

    output = pcrl("dataset", "import", "chest14", chest14, status=65)

    assert "not_held" in output and "python -m trainer dataset chest14" in output


def test_what_has_no_reader_is_refused(pcrl, tmp_path):
    assert "no reader is called mnist" in pcrl("dataset", "import", "mnist", tmp_path, status=65)


def test_a_scan_that_is_not_taken_is_named_and_the_others_may_go_on(pcrl, api, url, lits):
    (lits / "volume-1.nii").write_bytes(b"broken")

    output = pcrl("dataset", "import", "lits", lits, status=65)
    made = pcrl("dataset", "import", "lits", lits, "--skip-refused", "--name", "rest")

    assert "volume-1: not_a_scan" in output and "1 scans were not taken" in output
    with Client(url, api.tokens["admin"]) as client:
        found = client.dataset(made.split()[-1])
    assert {item.subject for item in found.items} == {"lits-0", "lits-2", "lits-test-0"}


def test_patients_get_names_that_the_service_takes():
    assert subject_of("lits", "7") == "lits-7"
    long = "1.3.6.1.4.1.14519.5.2.1.6279.6001.100225287222365663678666836860"
    assert subject_of("luna16", long) == subject_of("luna16", long) != subject_of("luna16", "1")
    assert len(subject_of("luna16", long)) <= 64
    assert " " not in subject_of("nnunet", "a b")


def test_a_table_of_classes_becomes_a_dataset(pcrl, api, url, chest14, tmp_path):
    sent = pcrl("upload", "--kind", "image_2d", *sorted(chest14.glob("*.png")))
    ids = [word for word in sent.split() if word.startswith("vol_")]
    table = tmp_path / "classes.csv"
    rows = ["volume_id,split,nodule,mass", f"{ids[0]},train,1,", f"{ids[1]},,0,1"]
    table.write_text("\n".join(rows))

    output = pcrl("dataset", "create", "Films", ids[2], "--classes", table)

    with Client(url, api.tokens["admin"]) as client:
        made = client.dataset(output.split()[-1])
    assert [item.volume_id for item in made.items] == [ids[2], ids[0], ids[1]]
    assert [item.classes for item in made.items] == [None, {"nodule": 1}, {"nodule": 0, "mass": 1}]
    assert made.items[1].split == "train"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,nodule\nvol_1,1\n", "no column volume_id"),
        ("volume_id,nodule\nvol_1,maybe\n", "nodule is neither 1 nor 0 nor empty"),
        ("volume_id,nodule\nvol_1\n", "line 2: not as many cells"),
        ("volume_id,nodule\nvol_1,1,0\n", "line 2: not as many cells"),
    ],
)
def test_a_table_that_is_not_understood_is_refused(pcrl, tmp_path, text, says):
    table = tmp_path / "classes.csv"
    table.write_text(text)

    assert says in pcrl("dataset", "create", "Films", "--classes", table, status=65)
