"""A folder or a list becomes scans with channels, examples and a split by subject."""

import json
from pathlib import Path

import pytest

from models.recipe import LabelledShare, SplitShares
from trainer.data.scan_set import SPLITS
from trainer.data.scans import discover, with_labelled
from trainer.errors import DataError

MODALITIES = ("flair", "t1c")


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_channels_of_a_folder_come_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    folder = touch(
        tmp_path, "a_image_t1c.nii.gz", "a_image_flair.nii.gz", "a_label.nii.gz",
        "b_image_flair.nii", "b_image_t1c.nii",
    )  # fmt: skip

    scans = {scan.id: scan for scan in discover(folder, channels=MODALITIES).scans}

    assert [path.name for path in scans["a"].images] == [
        "a_image_flair.nii.gz",
        "a_image_t1c.nii.gz",
    ]
    assert scans["a"].labels == folder / "a_label.nii.gz" and scans["b"].labels is None
    turned = discover(folder, channels=MODALITIES[::-1])
    assert turned.scans[0].image.name == "a_image_t1c.nii.gz"


def test_a_scan_that_lacks_a_channel_is_refused_by_name(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a_image_t1c.nii", "a_image_flair.nii", "b_image_flair.nii")

    with pytest.raises(DataError, match="unusable_scan: scan b has no channel t1c"):
        discover(folder, channels=MODALITIES)


def test_a_flat_folder_is_split_by_subject_and_subfolders_are_left_alone(tmp_path: Path) -> None:
    names = [f"s{number}.nii" for number in range(20)]
    flat = touch(tmp_path / "flat", *names)
    rows = [f"s{number},p{number // 2}" for number in range(20)]
    (flat / "labels.csv").write_text("\n".join(["id,subject", *rows]))
    made = touch(tmp_path / "made" / "train", *names).parent

    scans = discover(flat, shares=SplitShares())

    split_of = {scan.id: scan.split for scan in scans.scans}
    assert [len(scans.of(split)) for split in SPLITS] == [14, 2, 4]
    assert all(split_of[f"s{at}"] == split_of[f"s{at + 1}"] for at in range(0, 20, 2))
    assert discover(flat, shares=SplitShares()) == scans
    assert discover(flat, shares=SplitShares(seed=1)).digest != scans.digest
    assert len(discover(made, shares=SplitShares()).of("train")) == 20
    assert len(discover(flat).of("train")) == 20


def test_a_table_gives_subjects_places_and_known_labels(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.nii", "b.nii")
    (folder / "labels.csv").write_text(
        "id,subject,x_mm,y_mm,z_mm,nodule,calcified\n"
        "a,p1,1.5,-2,3,1,\n"
        "a,p1,4,5,6,0,0\n"
        "b,p1,,,,1,1\n"
    )

    a, b = discover(folder).scans

    assert [example.centre_mm for example in a.examples] == [(1.5, -2.0, 3.0), (4.0, 5.0, 6.0)]
    assert [dict(example.classes) for example in a.examples] == [
        {"nodule": 1},
        {"nodule": 0, "calcified": 0},
    ]
    assert a.subject == b.subject == "p1" and b.examples[0].centre_mm is None
    before = discover(folder).digest
    (folder / "labels.csv").write_text("id,nodule\na,1\nb,0\n")
    assert discover(folder).digest != before


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("scan,nodule\na,1\n", "no column id"),
        ("id,nodule\na,1\nc,0\n", "names scan c"),
        ("id,nodule\na,2\n", r"line 2: a label is '2'"),
        ("id,nodule\na\n", "line 2: not 2 cells"),
        ("id,nodule\na,1,0\n", "line 2: not 2 cells"),
        ("id,x_mm,y_mm,z_mm\na,1,2,\n", "line 2: no place"),
        ("id,x_mm,y_mm,z_mm\na,1,2,nan\n", "line 2: no place"),
        ("id,subject\na,p\na,q\n", "scan a has two subjects"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(tmp_path: Path, table: str, reason: str) -> None:
    folder = touch(tmp_path, "a.nii")
    (folder / "labels.csv").write_text(table)

    with pytest.raises(DataError, match=f"bad_scan_list: .*{reason}"):
        discover(folder)


def test_a_subject_in_two_splits_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "train", "a.nii")
    touch(tmp_path / "test", "b.nii")

    assert len(discover(tmp_path).of("test")) == 1
    (tmp_path / "labels.csv").write_text("id,subject\na,p\nb,p\n")
    with pytest.raises(DataError, match="split_leaks_subject: scan b"):
        discover(tmp_path)


def test_a_list_may_hold_channels_and_examples(tmp_path: Path) -> None:
    touch(tmp_path, "f.nii", "t.nii")
    entry = {
        "id": "x", "image": ["f.nii", "t.nii"],
        "examples": [{"classes": {"nodule": 1}, "centre_mm": [1, 2, 3]}],
    }  # fmt: skip
    path = tmp_path / "scans.json"
    path.write_text(json.dumps({"digest": "d", "scans": [entry]}))

    scan = discover(path).scans[0]

    assert [image.name for image in scan.images] == ["f.nii", "t.nii"]
    assert scan.examples[0].centre_mm == (1.0, 2.0, 3.0) and scan.split == "train"
    for change, reason in (
        ({"image": []}, "it has no image"),
        ({"image": ["f.nii", "gone.nii"]}, "does not exist"),
        ({"examples": [{"classes": {"nodule": 0.5}}]}, "scans.0.examples.0.classes.nodule"),
    ):
        path.write_text(json.dumps({"digest": "d", "scans": [{**entry, **change}]}))
        with pytest.raises(DataError, match=f"bad_scan_list: .*{reason}"):
            discover(path)


def test_fewer_labels_leave_validation_test_and_unlabelled_scans_alone(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(10)]
    touch(tmp_path / "train", *(f"{one}_image.nii" for one in [*names, "bare"]))
    touch(tmp_path / "train", *(f"{one}_label.nii" for one in names))
    for split in ("val", "test"):
        touch(tmp_path / split, f"{split}_image.nii", f"{split}_label.nii")
    scans = discover(tmp_path)

    few = with_labelled(scans, LabelledShare(ratio=0.2, seed=3))

    kept = {scan.id for scan in few.scans}
    assert len(kept & set(names)) == 2
    assert kept - set(names) == {"bare", "val", "test"}
    more = {scan.id for scan in with_labelled(scans, LabelledShare(ratio=0.5, seed=3)).scans}
    assert kept < more
    assert few.digest != scans.digest
    assert with_labelled(scans, LabelledShare()) is scans
