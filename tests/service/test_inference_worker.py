"""What one inference worker does with its queue: together, resident, and after a lack of memory."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

from imaging import nifti
from models.predict import embed
from models.regions import embed_regions
from models.session import open_session
from service import db, registry, resident, runs, spaces, tasks
from service import worker as workers
from service.embeddings import Filters
from service.settings import Settings
from service.storage import Store

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location(
    "tiny_bundles", ROOT / "tests" / "models" / "conftest.py"
)
_tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tiny)
make_bundle, random_encoder = _tiny.make_bundle, _tiny.random_encoder
mapped_encoder, thresholds = _tiny.mapped_encoder, _tiny.thresholds


@pytest.fixture
def database_url(sqlite_url):
    return sqlite_url


@pytest.fixture
def settings(tmp_path, database_url):
    resident.cache_of.cache_clear()
    return Settings(
        data_dir=tmp_path / "data", database_url=database_url, device="cpu", inference_threads=1
    )


@pytest.fixture
def scans(sessions, settings, tmp_path):
    """Six little scans in the store, as the intake leaves them."""
    store, found = Store(settings.data_dir), []
    random = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / f"{number}.nii"
        voxels = random.integers(0, 1000, size=(16, 16, 8)).astype(np.int16)
        nifti.write(path, voxels, np.eye(4))
        sha256, size = store.put_file(path)
        row = db.Volume(
            id=db.new_id("vol"),
            kind="image",
            subject=f"s{number}",
            modality="CT",
            format="nifti",
            original_sha256=sha256,
            voxels_sha256=sha256,
            shape=[16, 16, 8],
            spacing_mm=[1.0, 1.0, 1.0],
            affine=np.eye(4).tolist(),
            source_shape=[16, 16, 8],
            source_affine=np.eye(4).tolist(),
            intake={},
            created_by="t",
        )
        with sessions() as session:
            session.add(db.Blob(sha256=sha256, size_bytes=size))
            session.flush()
            session.add(row)
            session.commit()
        found.append(row)
    return found


def register(sessions, settings, folder, kind):
    digest = Store(settings.data_dir).publish_bundle(folder)
    with sessions() as session:
        registry.register(session, kind, kind=kind, digest=digest, manifest={})
        session.commit()
    return {"name": kind, "version": 1, "digest": digest}


def post(sessions, kind, volume, model, spec=None, **more):
    with sessions() as session:
        run = runs.create(
            session,
            kind=kind,
            spec={"model": model, "formats": [], **(spec or {})},
            volume_id=volume.id,
            principal="t",
            **more,
        )
        session.commit()
    return run.id


def test_embeddings_done_together_are_those_done_alone(
    sessions, settings, scans, make_bundle, random_encoder
):
    folder = make_bundle(random_encoder)
    model = register(sessions, settings, folder, "encoder")
    ids = [post(sessions, "embed", scan, model) for scan in scans]
    one = workers.make_worker(settings, "inference", name="w")

    assert workers.work_through(one, tasks.run, together=tasks.RunKind.EMBED) == len(ids)

    alone, store = open_session(folder), Store(settings.data_dir)
    with sessions() as session:
        results = [runs.get(session, run_id) for run_id in ids]
    for run, scan in zip(results, scans, strict=True):
        assert run.state == "succeeded", run.error
        volume = nifti.open_canonical(store.verify(scan.voxels_sha256))
        np.testing.assert_allclose(run.result["vector"], embed(alone, volume).vector, atol=1e-6)
    assert len({tuple(run.result["vector"]) for run in results}) == len(ids)
    told = [run.result["model_was_resident"] for run in results]
    assert told.count(True) >= 1 and told.count(False) >= 1
    assert results[0].result["precision"] == "float32"
    assert "fell_back_from" not in results[0].result


def test_regions_come_from_a_segmentation_or_from_a_segmenter(
    sessions, settings, scans, make_bundle, mapped_encoder, thresholds
):
    folder = make_bundle(mapped_encoder)
    encoder = register(sessions, settings, folder, "encoder")
    segmenter = register(
        sessions, settings, make_bundle(thresholds(3), labels=("bright", "rare")), "segmenter"
    )
    values = {"bright": 1, "rare": 2}
    segmentation = post(sessions, "segment", scans[0], segmenter)
    one = workers.make_worker(settings, "inference", name="w")
    assert workers.work_through(one, tasks.run) == 1
    sources = ({"segmentation_id": segmentation}, {"model": segmenter})
    ids = [
        post(sessions, "embed", scans[0], encoder, {"regions": {**source, "values": values}})
        for source in sources
    ]

    assert workers.work_through(one, tasks.run, together=tasks.RunKind.EMBED) == 2

    store, session_of_it = Store(settings.data_dir), open_session(folder)
    scan = nifti.open_canonical(store.verify(scans[0].voxels_sha256))
    labels = (scan.voxels > 500).astype(np.uint8)  # what the segmenter does, written out
    _, (bright, rare) = embed_regions(session_of_it, scan, labels, values)
    with sessions() as session:
        told = [runs.get(session, run_id) for run_id in ids]
        stored = session.scalars(select(db.Embedding).order_by(db.Embedding.region)).all()
        found = spaces.search(
            session,
            bright.vector.astype(np.float64),
            encoder["digest"],
            limit=5,
            filters=Filters(),
            max_bytes=1 << 20,
            region="bright",
        )
    for run in told:
        assert run.state == "succeeded", run.error
        first, second = run.result["regions"]
        assert (first["region"], first["num_voxels"]) == ("bright", bright.num_voxels)
        np.testing.assert_allclose(first["vector"], bright.vector, atol=1e-6)
        assert (second["region"], second["vector"], second["reason"]) == ("rare", None, rare.reason)
    assert rare.reason == "absent"
    assert [told[0].result["segmentation_id"], told[1].result["segmenter"]] == [
        segmentation,
        segmenter,
    ]
    assert [one.region for one in stored] == ["", "bright"]
    assert (found.items[0].volume_id, found.items[0].cosine) == (scans[0].id, pytest.approx(1.0))


def test_a_region_that_a_newer_run_finds_gone_is_found_no_longer(
    sessions, settings, scans, make_bundle, mapped_encoder, thresholds
):
    """Other regions keep theirs: of the same run, and those that it was not asked for."""
    encoder = register(sessions, settings, make_bundle(mapped_encoder), "encoder")
    segmenter = register(
        sessions, settings, make_bundle(thresholds(3), labels=("bright", "rare")), "segmenter"
    )
    one = workers.make_worker(settings, "inference", name="w")

    def regions_after(values: dict[str, int]) -> list[str]:
        asked = {"regions": {"model": segmenter, "values": values}}
        post(sessions, "embed", scans[0], encoder, asked)
        assert workers.work_through(one, tasks.run) == 1
        with sessions() as session:
            return sorted(session.scalars(select(db.Embedding.region)))

    before = regions_after({"a": 1, "b": 1, "unasked": 1})  # the label is there
    after = regions_after({"a": 2, "b": 1})  # no voxel has this label

    assert (before, after) == (["", "a", "b", "unasked"], ["", "b", "unasked"])


def test_a_segmentation_whose_mask_is_gone_fails_the_run_by_name(
    sessions, settings, scans, make_bundle, mapped_encoder
):
    encoder = register(sessions, settings, make_bundle(mapped_encoder), "encoder")
    gone = {"segmentation_id": f"seg_{'0' * 32}", "values": {"organ": 1}}
    run_id = post(sessions, "embed", scans[0], encoder, {"regions": gone})

    workers.work_through(workers.make_worker(settings, "inference", name="w"), tasks.run)

    with sessions() as session:
        run = runs.get(session, run_id)
    assert (run.state, run.error["code"]) == ("failed", "not_found")


def test_a_better_run_of_another_kind_is_not_passed(sessions, scans):
    model = {"name": "m", "version": 1, "digest": "0" * 64}
    worse = post(sessions, "embed", scans[0], model)
    better = post(sessions, "segment", scans[1], model, priority=5)

    with sessions() as session:
        assert runs.claim(session, None, "inference", "w", only=db.RunKind.EMBED) is None
        assert runs.claim(session, None, "inference", "w").run_id == better
        assert runs.claim(session, None, "inference", "w", only=db.RunKind.EMBED).run_id == worse


def test_results_say_that_the_cpu_stood_in(sessions, settings, scans, make_bundle, random_encoder):
    asked = settings.model_copy(update={"provider": "tensorrt", "cpu_fallback": True})
    model = register(sessions, settings, make_bundle(random_encoder), "encoder")
    run_id = post(sessions, "embed", scans[0], model)

    workers.work_through(workers.make_worker(asked, "inference", name="w"), tasks.run)

    with sessions() as session:
        result = runs.get(session, run_id).result
    assert result["provider"] == "CPUExecutionProvider"
    assert result["fell_back_from"] == "TensorrtExecutionProvider"


def test_without_the_fallback_the_run_fails_with_the_reason(
    sessions, settings, scans, make_bundle, random_encoder
):
    asked = settings.model_copy(update={"provider": "tensorrt"})
    model = register(sessions, settings, make_bundle(random_encoder), "encoder")
    run_id = post(sessions, "embed", scans[0], model)

    workers.work_through(workers.make_worker(asked, "inference", name="w"), tasks.run)

    with sessions() as session:
        assert runs.get(session, run_id).error["code"] == "provider_unavailable"


STARVED = textwrap.dedent(
    """
    import json, re, resource, sys
    from pathlib import Path
    import numpy as np
    from models.bundle import BundleError
    from service import resident
    from service.settings import Settings
    from service.storage import Store

    settings = Settings(data_dir=sys.argv[1], device="cpu", inference_threads=1)
    store, digest = Store(settings.data_dir), sys.argv[2]

    def job(held, batch, side):
        image = np.ones((batch, 1, side, side, side), np.float32)
        return float(held.session.run(image).sum()) / batch, held.facts()

    def done(batch, side):
        try:
            return resident.using(settings, store, digest, lambda held: job(held, batch, side))
        except BundleError as error:
            return error.code

    normal = done(1, 16)
    size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (60 << 20), -1))
    print(json.dumps([normal, done(256, 16), done(1, 256), done(1, 16)]))
    """
)


def test_after_a_lack_of_memory_a_smaller_batch_and_then_the_next_job_succeed(
    settings, make_bundle
):
    folder = make_bundle(_tiny.random_conv(64, output="embedding"))  # 1 MiB a window of 16 cubed
    digest = Store(settings.data_dir).publish_bundle(folder)

    child = subprocess.run(
        [sys.executable, "-c", STARVED, str(settings.data_dir), digest],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
        },
    )

    assert child.returncode == 0, child.stderr[-2000:]
    normal, retried, hopeless, after = json.loads(child.stdout.splitlines()[-1])
    assert "retried_after" not in normal[1]
    assert hopeless == "host_out_of_memory"
    assert retried[1]["retried_after"] == "host_out_of_memory"
    assert retried[0] == pytest.approx(normal[0], rel=1e-5)
    assert after[0] == normal[0]
    assert after[1]["model_was_resident"] is False  # nothing of the failure stayed
