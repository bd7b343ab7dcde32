"""Training leaves in the bundle what later scans are held against, by the code that serves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from imaging import nifti
from imaging.intake import read_scan
from imaging.volume import Volume
from models import bundle, cascade, ood, predict
from models.recipe import FinetuneRecipe, PretrainRecipe
from models.session import open_session
from trainer import finetune, pretrain, reference
from trainer.data.scans import discover
from trainer.errors import Preempted

CPU = torch.device("cpu")
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def ball(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A ball of 60 HU (label 1) with a core of 120 HU (label 2) in air."""
    random = np.random.default_rng(seed)
    place = np.stack(np.indices((24, 24, 24)), axis=-1)
    distance = np.linalg.norm(place - random.uniform(10, 14, 3), axis=-1)
    labels = (distance < 9).astype(np.uint8) + (distance < 4)
    voxels = np.select([labels == 2, labels == 1], [120, 60], -900)
    return (voxels + random.normal(0, 20, voxels.shape)).astype(np.int16), labels


@pytest.fixture(scope="module")
def seven_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six to train on, one to validate with."""
    folder = tmp_path_factory.mktemp("seven")
    for seed in range(7):
        home = folder / ("val" if seed == 6 else "train")
        home.mkdir(exist_ok=True)
        voxels, labels = ball(seed)
        nifti.write(home / f"s{seed}_image.nii.gz", voxels, AFFINE)
        nifti.write(home / f"s{seed}_label.nii.gz", labels.astype(np.uint8), AFFINE)
    return folder


def test_a_segmenter_keeps_its_training_scans_as_serving_sees_them(
    tmp_path: Path, seven_scans: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    scans = discover(seven_scans)
    folder = finetune.run(
        finetune_recipe, scans, tmp_path, report, device=CPU, should_stop=lambda: False
    )

    known = bundle.load(folder).reference
    session = open_session(folder, num_threads=1)
    stored = np.load(folder / bundle.REFERENCE)
    first = read_scan(scans.of("train")[0].image, kind="image").volume
    assert known is not None
    assert (known.num_scans, known.dims, known.space) == (6, 32, "features")
    np.testing.assert_allclose(stored[0], cascade.segment_case(session, first).features, atol=1e-6)
    assert f"those of {known.num_scans} training scans" in (folder / "card.md").read_text()
    assert (
        "info",
        f"reference of 6 training scans, threshold {known.threshold:.3g}",
    ) in report.logs
    like, _ = ball(20)
    near = cascade.segment_case(session, Volume(like, AFFINE))
    again = ood.reference_of(stored)
    assert known.threshold == pytest.approx(again.threshold, abs=1e-12)
    assert near.ood == ood.score(near.features, session.reference)
    assert near.ood.score == pytest.approx(ood.score(near.features, again).score, abs=1e-9)
    assert near.ood.n_reference == 6 and near.ood.reason is None


def test_an_encoder_keeps_its_training_scans(
    tmp_path: Path, seven_scans: Path, pretrain_recipe: PretrainRecipe, report
) -> None:
    recipe = pretrain_recipe.model_copy(update={"num_steps": 2})
    scans = discover(seven_scans)

    folder = pretrain.run(recipe, scans, tmp_path, report, device=CPU, should_stop=lambda: False)

    known = bundle.load(folder).reference
    session = open_session(folder, num_threads=1)
    assert known is not None and (known.num_scans, known.space) == (6, "embedding")
    noise = np.random.default_rng(0).integers(-900, 900, (24, 24, 24), np.int16)
    assert predict.embed(session, Volume(noise, AFFINE)).ood.is_out
    first = read_scan(scans.of("train")[0].image, kind="image").volume
    np.testing.assert_allclose(
        np.load(folder / bundle.REFERENCE)[0], predict.embed(session, first).vector, atol=1e-6
    )


def test_two_scans_are_too_few_and_the_bundle_says_so(
    tmp_path: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    folder = finetune.run(
        finetune_recipe, discover(scan_folder), tmp_path, report, device=CPU,
        should_stop=lambda: False,
    )  # fmt: skip

    known = bundle.load(folder).reference
    session = open_session(folder, num_threads=1)
    found = cascade.segment_case(session, Volume(ball(1)[0], AFFINE))
    assert known is not None and (known.num_scans, known.threshold) == (2, None)
    assert not (folder / bundle.REFERENCE).exists()
    assert found.ood.reason == "too_few_scans" and found.features is not None
    assert "2 training scans are too few" in (folder / "card.md").read_text()

    # Asked to stop meanwhile, it leaves nothing; a scan that is gone costs the reference alone.
    path, chosen = tmp_path / "reference.npy", discover(scan_folder).of("train")
    with pytest.raises(Preempted):
        reference.of_scans(
            folder, chosen, path, report, device=CPU, num_steps=12, should_stop=lambda: True
        )
    gone = [chosen[0].__class__("x", (tmp_path / "gone.nii",), None, "x", "train")]
    assert reference.of_scans(folder, gone, path, report, device=CPU, num_steps=12) is None
    assert report.logs[-1][0] == "warning" and not path.exists()


def test_of_many_scans_some_are_taken_at_even_distances(seven_scans: Path) -> None:
    scans = discover(seven_scans).of("train")

    assert reference.evenly(scans, 6) == list(scans)
    assert reference.evenly(scans, 3) == [scans[0], scans[2], scans[4]]
