"""A DICOM scan to certified results, through the worker's own code, with a real tiny model."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import highdicom
import numpy as np
import onnx
import pydicom
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import ndimage

from imaging import nifti
from imaging.dicom_header import quiet
from imaging.phantom import make
from imaging.phantom_dicom import write_dicom_zip
from models import bundle
from models.recipe import FinetuneRecipe, Postprocess, Preprocessing, Window
from service import migrate, registry, results, runs, tasks, volumes
from service.schemas import SegmentationResult
from service.settings import Settings
from service.worker import make_worker, work_through

LABELS = ("liver", "tumour")


def thresholds() -> onnx.ModelProto:
    """Class 1 above 0.1 of the window, class 2 above 0.75: three lines, the highest wins."""
    weight = np.array([0.0, 10.0, 20.0], np.float32).reshape(3, 1, 1, 1, 1)
    bias = np.array([0.0, -1.0, -8.5], np.float32)
    shape = ["batch", 1, "i", "j", "k"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight", "bias"], ["logits"])],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3, *shape[2:]])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def worker(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", device="cpu", inference_threads=1)
    migrate.upgrade(settings.database_url)
    worker = make_worker(settings, "inference", name="here")
    yield worker
    worker.sessions.kw["bind"].dispose()


@pytest.fixture
def model(worker, tmp_path) -> dict[str, object]:
    """The model, registered: what a run's spec names."""
    return registered(worker, tmp_path / "plain", Postprocess())


def registered(worker, folder, postprocess) -> dict[str, object]:
    folder.mkdir()
    network = thresholds()
    tensors = (("image", 1), ("logits", 3))
    image, logits = (
        bundle.TensorSpec(name=name, shape=("batch", channels, "i", "j", "k"))
        for name, channels in tensors
    )
    manifest = bundle.Manifest(
        kind="segmenter",
        labels=LABELS,
        inputs=(image,),
        outputs=(logits,),
        preprocessing=Preprocessing(
            spacing_mm=(12.0, 12.0, 20.0), intensity=Window(low_hu=-100.0, high_hu=400.0)
        ),
        patch_size=(16, 16, 8),
        postprocess=postprocess,
        recipe=FinetuneRecipe(labels={"liver": 1, "tumour": 2}),
        lineage=bundle.Lineage(
            dataset_digest="0" * 64, seed=0, num_steps=1, code_version="0", torch_version="0"
        ),
        parity=(),
        created_at=datetime.now(UTC),
    )
    for key, value in bundle.onnx_metadata(manifest).items():
        entry = network.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(network, folder / "network.onnx")
    saved = folder / "bundle"
    bundle.save(saved, manifest, {bundle.MODEL: folder / "network.onnx"}, "# Card\n")
    digest = worker.store.publish_bundle(saved)
    with worker.sessions() as session:
        version = registry.register(
            session,
            "liver-tumour",
            kind="segmenter",
            digest=digest,
            manifest=json.loads((saved / bundle.MANIFEST).read_bytes()),
            run_id=None,
        )
        session.commit()
        return {"name": "liver-tumour", "version": version.version, "digest": digest}


def ingested(worker, path):
    sha256, size = worker.store.put_file(path)
    with worker.sessions() as session:
        volume, _ = volumes.ingest(
            session, worker.store, sha256, size, kind="image", subject="s", series_uid=None,
            principal="t",
        )  # fmt: skip
        session.commit()
        return volume


def segmented(worker, model, volume, **spec):
    """A segmentation, done by the worker's code in this process."""
    with worker.sessions() as session:
        run = runs.create(
            session,
            kind="segment",
            volume_id=volume.id,
            spec={"model": model, **spec},
            principal="t",
        )
        session.commit()
    assert work_through(worker, tasks.run) == 1
    with worker.sessions() as session:
        return runs.get(session, run.id), runs.artifacts(session, run.id)


@pytest.fixture
def phantom_zip(tmp_path):
    phantom = make(4, shape=(32, 32, 16), spacing_mm=(12.0, 12.0, 20.0))
    return write_dicom_zip(phantom.volume, tmp_path / "scan.zip", seed=4)


def test_a_dicom_scan_gets_certified_results_in_every_format(worker, model, phantom_zip, tmp_path):
    volume = ingested(worker, phantom_zip)

    run, files = segmented(worker, model, volume, formats=["dicom-seg", "dicom-sr", "rtstruct"])

    assert run.state == "succeeded", run.error
    assert [one["format"] for one in run.result["files"]] == [
        "nifti", "dicom-seg", "dicom-sr", "rtstruct",
    ]  # fmt: skip
    assert run.result["not_made"] == []
    assert {one.name for one in files} == {
        "mask.nii.gz", "preview.png", "seg.dcm", "sr.dcm", "rtstruct.dcm",
    }  # fmt: skip
    by_name = {one.name: worker.store.verify(one.sha256) for one in files}
    assert min(run.result["voxels"].values()) > 0
    for one in run.result["files"]:
        if one["format"] == "dicom-sr":
            continue
        certificate = one["certificate"]
        assert certificate["sha256"] == one["sha256"]
        assert certificate["voxels"] == run.result["voxels"]
        assert certificate["max_corner_error_mm"] < 1e-3
        assert certificate["shape"] == volume.source_shape
    assert run.result["certificate"]["readers"][1].startswith("SimpleITK")
    assert_same_voxels(by_name["seg.dcm"], by_name["mask.nii.gz"])
    seg = pydicom.dcmread(by_name["seg.dcm"])
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert model["digest"] in algorithm.AlgorithmParameters
    assert run.id in seg.SegmentSequence[0].TrackingID


def assert_same_voxels(seg_path, mask_path):
    """The SEG, by highdicom's reader, and the NIfTI hold the same label at the same place."""
    with quiet():
        seg = highdicom.seg.segread(seg_path).get_volume(combine_segments=True)
    mask, header = nifti.read_stored(mask_path)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ seg.affine
    step = np.linalg.inv(header.affine) @ to_ras
    index = np.argwhere(seg.array >= 0)
    at = index @ step[:3, :3].T + step[:3, 3]
    assert np.abs(at - np.rint(at)).max() < 1e-3
    assert np.array_equal(seg.array.ravel(), mask[tuple(np.rint(at).astype(int).T)])


def test_a_scan_that_was_no_dicom_gets_a_mask_and_a_reason(worker, model, tmp_path):
    phantom = make(4, shape=(32, 32, 16), spacing_mm=(12.0, 12.0, 20.0))
    path = tmp_path / "scan.nii.gz"
    nifti.write(path, phantom.volume.voxels, phantom.volume.affine)

    run, files = segmented(worker, model, ingested(worker, path))

    assert run.state == "succeeded"
    assert {one.name for one in files} == {"mask.nii.gz", "preview.png"}
    assert {(one["format"], one["code"]) for one in run.result["not_made"]} == {
        ("dicom-seg", "source_not_dicom"),
        ("dicom-sr", "source_not_dicom"),
    }


def test_the_mask_that_leaves_is_the_cleaned_one_and_the_result_lists_its_lesions(
    worker, model, tmp_path
):
    hu = np.full((24, 20, 16), -100, np.int16)
    hu[2:12, 3:13, 2:12] = 100  # the liver
    hu[9, 9, 9] = -100  # its hole
    hu[4:7, 4:7, 4:7] = hu[4:6, 9:11, 4:6] = 390  # two tumours
    hu[16:19, 4:7, 4:7] = 100  # a detached blob
    hu[16:18, 12:14, 4:6] = 390  # a tumour in nothing
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])  # stored LPS-wise, so that the source grid is another
    path = tmp_path / "scan.nii.gz"
    nifti.write(path, hu, np.diag([12.0, 12.0, 20.0, 1.0]) @ flip)
    scan = ingested(worker, path)
    cleaning = registered(
        worker,
        tmp_path / "cleaning",
        Postprocess(
            parts={"liver": ("tumour",)},
            keep_largest=("liver",),
            fill_holes=("liver",),
            lesions=("tumour",),
        ),
    )

    off, off_files = segmented(worker, model, scan)
    on, on_files = segmented(worker, cleaning, scan)

    def mask_of(files):
        (one,) = (file for file in files if file.name == "mask.nii.gz")
        return nifti.read_stored(worker.store.verify(one.sha256))[0]

    raw, mask = mask_of(off_files), mask_of(on_files)
    assert ndimage.label(raw > 0)[1] == 3 and raw[9, 9, 9] == 0  # the control: all is there
    assert off.result["lesions"] == off.result["removed_voxels"] == {}
    assert ndimage.label(mask > 0)[1] == 1 and mask[9, 9, 9] == 1
    assert on.result["removed_voxels"] == {"liver": 27, "tumour": 8}
    assert on.result["filled_voxels"] == {"liver": 1, "tumour": 0}
    counted = {"liver": 1000 - 27 - 8, "tumour": 27 + 8}
    assert on.result["voxels"] == on.result["certificate"]["voxels"] == counted
    tumours = on.result["lesions"]["tumour"]
    assert tumours["num"] == ndimage.label(mask == 2)[1] == 2
    assert [one["voxels"] for one in tumours["largest"]] == [27, 8]
    assert sum(one["volume_ml"] for one in tumours["largest"]) == pytest.approx(
        on.result["volumes_ml"]["tumour"]
    )
    assert tumours["largest"][0]["longest_mm"] == pytest.approx((36**2 + 36**2 + 60**2) ** 0.5)
    assert tumours["largest"][0]["centroid_mm"] == pytest.approx([-60.0, -60.0, 100.0])
    shown = SegmentationResult.model_validate(on.result)
    assert shown.lesions["tumour"].largest[0].voxels == 27


def flipped(path, voxels, affine, **options):
    nifti.write(path, voxels[::-1], affine, **options)


def half_a_voxel_off(path, voxels, affine, **options):
    moved = affine.copy()
    moved[:3, 3] += affine[:3, 0] / 2
    nifti.write(path, voxels, moved, **options)


def swapped(path, voxels, affine, **options):
    nifti.write(path, np.array([0, 2, 1], np.uint8)[voxels], affine, **options)


def without_a_label(path, voxels, affine, **options):
    nifti.write(path, np.where(voxels == 2, 0, voxels).astype(np.uint8), affine, **options)


class Sabotaged:
    """The NIfTI writer with a fault; everything else as it is."""

    def __init__(self, write) -> None:
        self.write = write


@pytest.mark.parametrize("fault", [flipped, half_a_voxel_off, swapped, without_a_label])
def test_a_writer_with_a_fault_makes_no_result(worker, model, phantom_zip, monkeypatch, fault):
    volume = ingested(worker, phantom_zip)
    monkeypatch.setattr(results, "nifti", Sabotaged(fault))

    run, files = segmented(worker, model, volume)

    assert (run.state, run.error["code"]) == ("failed", "geometry_not_certified")
    assert run.result is None and list(files) == []


def test_an_older_run_without_formats_is_done_like_a_new_one(worker, model, phantom_zip):
    run, _ = segmented(worker, model, ingested(worker, phantom_zip))

    assert [one["format"] for one in run.result["files"]] == ["nifti", "dicom-seg", "dicom-sr"]
