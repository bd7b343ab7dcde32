"""An experiment from the shell: resumable, honest about failures, the same table after a kill."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from models import bundle
from models.experiment.plan import Plan, cells
from trainer import experiment, finetune, pretrain
from trainer.data.scans import discover
from trainer.errors import DataError, NonFiniteLossError, Preempted

pytestmark = pytest.mark.slow

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


@pytest.mark.nightly
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


def pretrained_on(plan: Plan, source: Path, target: Path, out: Path, report, monkeypatch):
    """The scans that reach the first pretraining."""
    seen = []

    def stop_here(recipe, scans, *_, **__):
        seen.append(scans)
        raise Preempted(0)

    monkeypatch.setattr(pretrain, "run", stop_here)
    with pytest.raises(Preempted):
        do(plan, target, out, report, source=source)
    return seen[0]


def test_pretraining_never_sees_who_validates_and_tests(
    tmp_path: Path, target: Path, plan: Plan, report, monkeypatch
) -> None:
    everything = discover(target)
    scans = pretrained_on(plan, target, target, tmp_path, report, monkeypatch)

    assert {scan.subject for scan in everything.scans} == set("abcde")
    assert [scan.subject for scan in scans.scans] == ["a", "b"]
    # A study of before goes on: the digest is what it was when only this pair was looked at.
    facts = "\n".join([everything.digest, "a", "b"])
    assert scans.digest == hashlib.sha256(facts.encode()).hexdigest()


def test_a_copy_under_other_names_is_no_way_round(
    tmp_path: Path, target: Path, plan: Plan, report, monkeypatch
) -> None:
    """A name that tests; a test scan unpacked, one packed anew, and another scan of its patient."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(target / "train" / "a_image.nii.gz", source / "new1.nii.gz")
    shutil.copy(target / "train" / "b_image.nii.gz", source / "d.nii.gz")  # a name that tests
    test_scan = gzip.decompress((target / "test" / "e_image.nii.gz").read_bytes())
    (source / "new2.nii").write_bytes(test_scan)
    (source / "new3.nii.gz").write_bytes(gzip.compress(test_scan, 1, mtime=1))

    shutil.copy(target / "train" / "b_image.nii.gz", source / "new4.nii.gz")
    (source / "labels.csv").write_text("id,subject\nnew3,x\nnew4,x\n")

    scans = pretrained_on(plan, source, target, tmp_path / "out", report, monkeypatch)

    assert [scan.id for scan in scans.scans] == ["new1"]
    told = [message for _, message in report.logs if "leaves out" in message]
    assert told == [
        "pretraining leaves out 4 of 5 scans, which the target validates or tests on: 1 by "
        "patient, 3 more by content"
    ]


def test_a_source_of_other_patients_stays_as_it_is(
    tmp_path: Path, target: Path, plan: Plan, report, monkeypatch
) -> None:
    scans = pretrained_on(plan, target / "train", target, tmp_path, report, monkeypatch)

    assert scans == discover(target / "train")
    assert not [message for _, message in report.logs if "leaves out" in message]


def test_a_source_of_nobody_but_test_patients_is_refused(
    tmp_path: Path, target: Path, plan: Plan, report
) -> None:
    with pytest.raises(DataError, match="no_scans"):
        do(plan, target, tmp_path, report, source=target / "test")


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
