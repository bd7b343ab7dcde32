"""The studies: their plans are valid, and they find the scans where the data lie."""

from __future__ import annotations

import pytest

from benchmarks import studies
from models.experiment.plan import Plan, cells
from trainer.data.scans import discover

NUM_SCANS = {"hippocampus": 110, "liver": 16, "films": 799}


@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_plan_is_valid_and_asks_for_three_ratios_and_seeds(name: str) -> None:
    plan = Plan.model_validate(studies.STUDIES[name].plan())

    kinds = [cell.kind for cell in cells(plan)]

    assert (kinds.count("pretrain"), kinds.count("finetune")) == (3 * 3, 4 * 3 * 3)
    assert plan.methods[0].name == "pcrl"


@pytest.mark.skipif(not studies.DATA.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_scan_is_laid_out_with_its_labels(name: str, tmp_path) -> None:
    study = studies.STUDIES[name]
    recipe = Plan.model_validate(study.plan()).finetune

    study.lay_out(studies.DATA, tmp_path)
    found = discover(tmp_path, shares=recipe.split, dims=recipe.network.dims)

    assert len(found.scans) == NUM_SCANS[name]
    assert all(scan.labels is not None or scan.examples for scan in found.scans)
    assert {scan.split for scan in found.scans} == {"train", "val", "test"}
