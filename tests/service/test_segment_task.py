"""One segmentation, done as the worker does it: two passes, a flip, and a map that is certified."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sqlalchemy import select

from imaging import nifti
from models import bundle
from models.bundle import Lineage, Manifest, Quality, TensorSpec
from models.recipe import FinetuneRecipe, Preprocessing, Window
from service import (
    cascades,
    db,
    migrate,
    registry,
    resident,
    runs,
    tasks,
    volumes,
    warmer,
    warming,
)
from service import worker as workers
from service.lease import Keeper
from service.schemas import CascadeCreate, SegmentationResult
from service.settings import Settings
from service.worker import make_worker

SHAPE = ["batch", 1, "i", "j", "k"]
AFFINE = np.array([[-1.5, 0, 0, 40], [0, -1.5, 0, 60], [0, 0, 2, -30], [0, 0, 0, 1]], float)
"""Stored LPS-wise, as most CT is."""


@pytest.fixture
def worker(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", device="cpu", inference_threads=1)
    migrate.upgrade(settings.database_url)
    return make_worker(settings, "inference", name="test")


def bright_is_organ(path, metadata):
    """Label 1 where the input is above one half."""
    weight = np.array([-8.0, 8.0], np.float32).reshape(2, 1, 1, 1, 1)
    weights = {"weight": weight, "bias": np.array([4.0, -4.0], np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight", "bias"], ["logits"])],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, "i", "j", "k"])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)


def register(session, worker, folder, name, spacing_mm):
    manifest = Manifest(
        kind="segmenter",
        labels=("organ",),
        inputs=(TensorSpec(name="image", shape=tuple(SHAPE)),),
        outputs=(TensorSpec(name="logits", shape=("batch", 2, "i", "j", "k")),),
        preprocessing=Preprocessing(
            spacing_mm=(spacing_mm,) * 3, intensity=Window(low_hu=0.0, high_hu=1000.0)
        ),
        patch_size=(16, 16, 16),
        quality=Quality(
            max_foreground_entropy=0.9, min_dice=0.7, num_cases=3, num_good=3, split="val"
        ),
        recipe=FinetuneRecipe(labels={"organ": 1}),
        lineage=Lineage(
            dataset_digest="0" * 64, seed=0, num_steps=1, code_version="test", torch_version=""
        ),
        parity=(),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    bright_is_organ(folder / f"{name}.onnx", bundle.onnx_metadata(manifest))
    bundle.save(folder / name, manifest, {bundle.MODEL: folder / f"{name}.onnx"}, "# Card\n")
    made = bundle.load(folder / name).model_dump(mode="json")
    digest = worker.store.publish_bundle(folder / name)
    registry.register(session, name, kind="segmenter", digest=digest, manifest=made)


def segmented(worker, version, volume, **options):
    """A run of this version on the volume, to its end."""
    model = {"name": version.model_name, "version": version.version, "digest": version.digest}
    with worker.sessions() as session:
        run = runs.create(
            session,
            kind=db.RunKind.SEGMENT,
            spec={"model": model, "formats": [], **options},
            volume_id=volume.id,
            principal="t",
        )
        session.commit()
        lease = runs.claim(session, run.id, "inference", "test")
    with Keeper(worker.sessions, lease, heartbeat_s=60.0) as keeper:
        tasks.run(worker, lease, keeper)
    with worker.sessions() as session:
        done = runs.get(session, run.id)
        assert done.state == "succeeded", done.error
        names = [artifact.name for artifact in runs.artifacts(session, run.id)]
        files = {name: worker.store.verify(runs.artifact(session, run.id, name).sha256)
                 for name in names}  # fmt: skip
    SegmentationResult.model_validate(done.result)
    return done.result, files


def ingested(session, worker, folder):
    voxels = np.full((40, 44, 36), 100, np.int16)
    voxels[12:20, 20:30, 8:16] = 900
    nifti.write(folder / "scan.nii.gz", voxels, AFFINE)
    sha256, size = worker.store.put_file(folder / "scan.nii.gz")
    volume, _ = volumes.ingest(
        session,
        worker.store,
        sha256,
        size,
        subject="s",
        series_uid=None,
        principal="t",
        kind="image",
    )
    return volume


def test_a_scan_that_does_not_fit_fails_with_the_sentence_that_says_so(worker, tmp_path):
    tight = replace(
        worker, settings=worker.settings.model_copy(update={"inference_memory_bytes": 100_000})
    )
    with worker.sessions() as session:
        volume = ingested(session, worker, tmp_path)
        register(session, worker, tmp_path, "fine", 1.5)
        version = registry.get_version(session, "fine", 1)
        session.commit()
        session.refresh(volume)
        model = {"name": "fine", "version": 1, "digest": version.digest}
        run = runs.create(
            session, kind="segment", spec={"model": model}, volume_id=volume.id, principal="t"
        )
        session.commit()
        lease = runs.claim(session, run.id, "inference", "test")

    workers.work_on(tight, lease, tasks.run)
    fits, _ = segmented(worker, version, volume)

    with worker.sessions() as session:
        failed = runs.get(session, run.id)
        assert (failed.state, failed.error["code"]) == ("failed", "insufficient_memory")
        assert "needs" in failed.error["detail"] and "available" in failed.error["detail"]
        assert not runs.artifacts(session, run.id)
    assert fits["voxels"]["organ"] > 500  # the control: with room it is done


def test_a_lack_of_memory_in_the_midst_leaves_one_run_with_one_result(
    worker, tmp_path, monkeypatch
):
    with worker.sessions() as session:
        volume = ingested(session, worker, tmp_path)
        register(session, worker, tmp_path, "fine", 1.5)
        version = registry.get_version(session, "fine", 1)
        session.commit()
        session.refresh(volume)
    plain, _ = segmented(worker, version, volume)
    publish, tried = tasks.results.publish, []

    def scarce(*args, **how):
        made = publish(*args, **how)
        tried.append(made)
        if len(tried) == 1:
            raise MemoryError
        return made

    monkeypatch.setattr(tasks.results, "publish", scarce)

    found, files = segmented(worker, version, volume)

    assert (len(tried), found["retried_after"]) == (2, "host_out_of_memory")
    assert found["voxels"] == plain["voxels"] and "retried_after" not in plain
    assert set(files) == {"mask.nii.gz", "preview.png"}
    with worker.sessions() as session:
        (run,) = session.scalars(select(db.Run).order_by(db.Run.created_at.desc()).limit(1))
        assert (run.attempt, run.state, run.error) == (1, "succeeded", None)
        states = [e.data["state"] for e in runs.events_after(session, run.id) if e.type == "state"]
    assert states == ["queued", "starting", "running", "succeeded"]


def test_both_networks_of_a_cascade_are_warm_and_stay(worker, tmp_path):
    with worker.sessions() as session:
        register(session, worker, tmp_path, "fine", 1.5)
        register(session, worker, tmp_path, "coarse", 4.0)
        ask = CascadeCreate(fine="fine", coarse="coarse", organ="organ", margin_mm=9.0)
        digest = cascades.create(session, worker.store, "fine", ask).digest
        session.flush()
        warming.ask(session, digest, for_s=60.0)
        session.commit()
    cache = resident.cache_of(worker.settings.session_cache_bytes)
    cache.pin([])
    cache.drop_unpinned()
    resident.hold(worker.settings, worker.store, digest)  # a request has loaded one of the two
    assert not resident.is_whole(worker.settings, digest)

    one = warmer.Warmer(worker.sessions, worker.settings, worker.store, "w")
    assert one.once() == [digest]
    cache.drop_unpinned()

    assert {digest, resident.coarse_key(digest)} <= set(cache.digests())
    assert resident.is_whole(worker.settings, digest)
    cache.pin([])
    cache.drop_unpinned()
    assert cache.digests() == []  # the control: what is not wanted leaves


def test_two_passes_give_the_mask_of_one_and_tell_how_they_looked(worker, tmp_path):
    with worker.sessions() as session:
        volume = ingested(session, worker, tmp_path)
        register(session, worker, tmp_path, "fine", 1.5)
        register(session, worker, tmp_path, "coarse", 4.0)
        ask = CascadeCreate(fine="fine", coarse="coarse", organ="organ", margin_mm=9.0)
        twice = cascades.create(session, worker.store, "fine", ask)
        once = registry.get_version(session, "fine", 1)
        session.commit()
        session.refresh(volume)

    plain, plain_files = segmented(worker, once, volume)
    found, files = segmented(worker, twice, volume, flips=["j"], uncertainty=True)

    mask, grid = nifti.read(files["mask.nii.gz"])
    one_pass, _ = nifti.read(plain_files["mask.nii.gz"])
    np.testing.assert_array_equal(mask.voxels, one_pass.voxels)
    assert plain["voxels"]["organ"] == found["voxels"]["organ"] > 500
    passes = found["cascade"]
    assert (passes["organ"], passes["fallback"], passes["is_cut"]) == ("organ", None, False)
    assert passes["num_windows"]["fine"] % 2 == 0  # one flip: every window twice
    assert found["num_windows"] == sum(passes["num_windows"].values())
    assert found["flips"] == ["j"] and "coarse" in found["timings_s"]
    assert found["quality"] == {"flag": "ok", "reasons": [], "max_foreground_entropy": 0.9}
    entropies, entropy_grid = nifti.read(files["uncertainty.nii.gz"])
    np.testing.assert_allclose(entropy_grid.affine, grid.affine)
    np.testing.assert_allclose(grid.affine, AFFINE)
    assert 0 < (entropies.voxels > 0).mean() < 0.8  # nothing outside of the box
    stored = files["uncertainty.nii.gz"].read_bytes()
    assert found["uncertainty"]["map"]["size_bytes"] == len(stored)
    assert 0 < found["uncertainty"]["mean_foreground_entropy"] < 0.9
    # The control: without asking there is neither pass nor map.
    assert plain["cascade"] is None and plain["uncertainty"]["map"] is None
    assert "uncertainty.nii.gz" not in plain_files and plain["flips"] == []
