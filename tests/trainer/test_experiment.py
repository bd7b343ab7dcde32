"""An experiment from the shell: resumable, honest about failures, the same table after a kill."""

import json
from pathlib import Path

import pytest
import torch

from models import bundle
from models.experiment.plan import Plan, cells
from trainer import experiment, finetune, pretrain
from trainer.data.scans import discover
from trainer.errors import DataError, NonFiniteLossError, Preempted

CPU = torch.device("cpu")
FORMS = ("report.json", "report.md", "curve.svg", "cases.csv")


@pytest.fixture
def target(tested_folder: Path) -> Path:
    return tested_folder


@pytest.fixture
def plan(finetune_recipe, pretrain_recipe) -> Plan:
    fields = {**finetune_recipe.model_dump(mode="json"), "num_steps": 2, "batch_size": 1}
    del fields["labelled"]
    methods = [{"name": "pcrl", "pretrain": pretrain_recipe.model_dump(mode="json")}]
    return Plan.model_validate(
        {
            "methods": [*methods, {"name": "scratch"}],
            "finetune": fields,
            "ratios": [0.5, 1.0],
            "seeds": [0],
            "budget": {"pretrain_steps": 2},
        }
    )


def do(plan: Plan, target: Path, out: Path, report, *, stop_after=10**9, source=None, **more):
    """Call the command; asked more often than `stop_after`, it is to stop."""
    asked = iter(range(10**9))
    return experiment.run(
        plan,
        source or target,
        target,
        out,
        report,
        device=CPU,
        should_stop=lambda: next(asked) >= stop_after,
        **more,
    )


def forms(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in FORMS}


def test_a_study_stopped_anywhere_ends_with_the_same_table(
    tmp_path: Path, target: Path, plan: Plan, report, without_onnx
) -> None:
    whole = do(plan, target, tmp_path / "whole", report)

    calls = 0
    while True:
        calls += 1
        try:
            do(plan, target, tmp_path / "parts", report, stop_after=4)
            break
        except Preempted:
            assert calls < 40

    assert calls > 3  # it was stopped, in trainings and between them
    assert {one.state for one in whole.values()} == {"succeeded"}
    assert forms(tmp_path / "parts") == forms(tmp_path / "whole")
    told = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert (told["num_cases"], told["missing"]) == (2, [])
    rows = (tmp_path / "whole" / "cases.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2 * 2  # methods, ratios, test cases, labels


def test_finished_trainings_are_not_done_again_and_an_extended_plan_adds_to_them(
    tmp_path: Path, target: Path, plan: Plan, report, without_onnx, monkeypatch
) -> None:
    plan = plan.model_copy(update={"methods": plan.methods[1:], "ratios": (1.0,)})
    do(plan, target, tmp_path, report)
    done = []
    real = finetune.run
    monkeypatch.setattr(finetune, "run", lambda *a, **k: (done.append(a[2]), real(*a, **k)))

    do(plan, target, tmp_path, report)
    assert done == []
    more = plan.model_copy(update={"seeds": (0, 1)})
    found = do(more, target, tmp_path, report)

    assert [place.name for place in done] == ["1"]
    assert len(found) == 2 and {one.state for one in found.values()} == {"succeeded"}


def test_pretraining_never_sees_who_validates_and_tests(
    tmp_path: Path, target: Path, plan: Plan, report, monkeypatch
) -> None:
    seen = []

    def stop_here(recipe, scans, *_, **__):
        seen.append({scan.subject for scan in scans.scans})
        raise Preempted(0)

    monkeypatch.setattr(pretrain, "run", stop_here)
    for source in (target, target / "test"):
        with pytest.raises(Preempted):
            do(plan, target, tmp_path, report, source=source)

    everybody = {scan.subject for scan in discover(target).scans}
    assert len(seen[0]) == 2 and len(everybody) == 5
    assert len(seen[1]) == 2  # another folder is the user's own word


def test_a_failed_pretraining_fails_what_needs_it_and_nothing_else(
    tmp_path: Path, target: Path, plan: Plan, report, without_onnx, monkeypatch
) -> None:
    real = pretrain.run

    def diverge(*_, **__):
        raise NonFiniteLossError(3)

    monkeypatch.setattr(pretrain, "run", diverge)
    plan = plan.model_copy(update={"ratios": (1.0,)})

    found = do(plan, target, tmp_path, report)

    states = {key: one.state for key, one in found.items()}
    assert states == {
        "pretrain/pcrl/0": "failed",
        "finetune/pcrl/100%/0": "failed",
        "finetune/scratch/100%/0": "succeeded",
    }
    assert found["finetune/pcrl/100%/0"].reason.startswith("pretraining_failed: non_finite_loss")
    assert "| `pretrain/pcrl/0` | failed |" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(pretrain, "run", real)
    assert do(plan, target, tmp_path, report) == found  # failed stays failed until asked
    again = do(plan, target, tmp_path, report, retry=True)
    assert {one.state for one in again.values()} == {"succeeded"}
    encoder = bundle.digest_of(tmp_path / "cells/pretrain/pcrl/0/bundle")
    tuned = bundle.load(tmp_path / "cells/finetune/pcrl/100%/0/bundle")
    assert tuned.lineage.parent_digest == encoder


def test_a_training_that_another_process_holds_is_left_to_it(
    tmp_path: Path, target: Path, plan: Plan, report, without_onnx, monkeypatch
) -> None:
    plan = plan.model_copy(update={"methods": plan.methods[1:]})
    first, second = (cell.key for cell in cells(plan))
    monkeypatch.setattr(experiment, "POLL_S", 0.0)

    with experiment._held(tmp_path / "cells" / first) as is_ours:
        assert is_ours
        with pytest.raises(Preempted):
            do(plan, target, tmp_path, report, stop_after=30)

    assert experiment.outcome(tmp_path, cells(plan)[0]).state == "open"
    assert experiment.outcome(tmp_path, cells(plan)[1]).state == "succeeded"
    assert second != first


def test_a_target_without_test_scans_is_refused(
    tmp_path: Path, scan_folder: Path, plan: Plan, report
) -> None:
    with pytest.raises(DataError, match="no_test_scans"):
        do(plan, scan_folder, tmp_path, report)
