"""An experiment's cells, and the report of their results."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from pydantic import ValidationError

from models.experiment import render
from models.experiment.cases import CaseResult, CaseResults, CaseTable
from models.experiment.curve import svg
from models.experiment.plan import Method, Plan, cells, extended, recipe_of
from models.experiment.report import Outcome, build

NETWORK = {"base_width": 2}
FINETUNE = {"kind": "finetune", "network": NETWORK, "labels": {"liver": 1}}
PRETRAIN = {"kind": "pretrain", "network": NETWORK}


def plan(**fields) -> Plan:
    given = {
        "methods": [{"name": "pcrl", "pretrain": PRETRAIN}, {"name": "scratch"}],
        "finetune": FINETUNE,
        "ratios": [0.2, 0.1],
        "seeds": [0, 1, 2],
    }
    return Plan.model_validate({**given, **fields})


def outcomes(asked: Plan, *, gain=0.15, patients=12) -> dict[str, Outcome]:
    """Every cell done; pcrl is better by `gain` at 10 % and by nothing at 20 %."""
    found = {}
    random = np.random.default_rng(1)
    base = random.uniform(0.5, 0.7, patients)
    for cell in cells(asked):
        results = None
        if cell.kind == "finetune":
            better = gain if cell.method == "pcrl" and cell.ratio == 0.1 else 0.0
            scores = base + better + random.normal(0, 0.004, patients)
            results = CaseResults(
                measure="dice",
                labels=("liver",),
                cases=tuple(
                    CaseResult(case_id=f"c{at}", subject=f"p{at}", values={"liver": float(score)})
                    for at, score in enumerate(scores)
                ),
            )
        found[cell.key] = Outcome("succeeded", results)
    return found


def report(asked: Plan, found, **names):
    return build(asked, found, **{"name": "Liver", "source": "LUNA", "target": "LiTS", **names})


def test_a_plan_is_a_pretraining_a_method_and_seed_and_a_finetuning_a_method_ratio_and_seed():
    found = {cell.key: cell for cell in cells(plan())}

    assert sorted(key for key in found if key.startswith("pretrain")) == [
        "pretrain/pcrl/0",
        "pretrain/pcrl/1",
        "pretrain/pcrl/2",
    ]
    assert len(found) == 3 + 2 * 2 * 3
    assert found["finetune/pcrl/10%/1"].parent == "pretrain/pcrl/1"
    assert found["finetune/scratch/10%/1"].parent is None
    once = {cell.key: cell for cell in cells(plan(pretrain_per="method"))}
    assert once["finetune/pcrl/10%/1"].parent == "pretrain/pcrl"
    assert len(once) == 1 + 2 * 2 * 3


def test_what_no_seed_changes_is_made_once_and_compared_as_it_is():
    """ImageNet's weights come from a file; the control is a pretraining in its place."""
    network = {"kind": "resnet18_unet2d"}
    fields = {"kind": "pretrain", "network": network}
    finetune = {"kind": "classify", "network": network, "labels": ["a"]}
    told = {}
    for name in ("imagenet", "pcrl"):
        arm = {"name": "arm", "pretrain": {**fields, "method": {"name": name}}}
        methods = [arm, {"name": "scratch"}]
        keys = {cell.key for cell in cells(plan(methods=methods, finetune=finetune))}
        once = plan(methods=methods, finetune=finetune, ratios=[0.1], pretrain_per="method")
        found = report(once, outcomes(once))
        told[name] = (
            {key for key in keys if key.startswith("pretrain")},
            [one.untested for one in found.comparisons],
            "pretrained once" in render.markdown(found),
        )

    assert told["imagenet"] == ({"pretrain/arm"}, [None], False)
    seeds = {f"pretrain/arm/{seed}" for seed in (0, 1, 2)}
    assert told["pcrl"] == (seeds, ["single_pretraining"], True)


def test_cells_of_a_seed_differ_by_method_and_share_everything_else():
    asked = plan(budget={"pretrain_steps": 7, "finetune_steps": 9})
    by_key = {cell.key: recipe_of(asked, cell) for cell in cells(asked)}

    ours, theirs = by_key["finetune/pcrl/10%/2"], by_key["finetune/scratch/10%/2"]
    assert ours == theirs
    assert (ours.seed, ours.num_steps) == (2, 9)
    assert (ours.labelled.ratio, ours.labelled.seed) == (0.1, 2)
    assert by_key["finetune/pcrl/20%/2"].labelled.seed == 2  # nested: the same order of patients
    before = by_key["pretrain/pcrl/2"]
    assert (before.kind, before.seed, before.num_steps) == ("pretrain", 2, 7)
    tuned = plan(methods=[{"name": "scratch", "learning_rate": 0.5}])
    assert recipe_of(tuned, cells(tuned)[0]).learning_rate == 0.5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"methods": [{"name": "a"}, {"name": "a"}]}, "methods names one twice"),
        ({"ratios": [0.1, 0.10000001]}, "two ratios differ"),
        ({"finetune": {**FINETUNE, "labelled": {"ratio": 0.5}}}, "leave it out"),
        ({"finetune": {**FINETUNE, "network": {"base_width": 4}}}, "network of pcrl"),
        ({"ratios": list(np.linspace(0.1, 1, 32)), "seeds": list(range(32))}, "takes 2080"),
    ],
)
def test_a_plan_that_cannot_be_right_is_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        plan(**fields)


def test_an_extended_plan_keeps_its_cells():
    before, more = plan(), Method(name="late")

    after = extended(before, methods=(more,), ratios=(0.5, 0.1), seeds=(3,))

    assert {cell.key for cell in cells(before)} < {cell.key for cell in cells(after)}
    assert len(cells(after)) == 4 + 3 * 3 * 4
    with pytest.raises(ValueError, match="with another recipe"):
        extended(before, methods=(Method(name="pcrl"),))


def test_a_report_tells_an_effect_from_none():
    asked = plan()

    found = report(asked, outcomes(asked))

    by_ratio = {one.ratio: one for one in found.comparisons}
    assert by_ratio[0.1].significant and by_ratio[0.1].difference == pytest.approx(0.15, abs=0.01)
    assert by_ratio[0.1].low > 0.1
    assert not by_ratio[0.2].significant and by_ratio[0.2].low < 0 < by_ratio[0.2].high
    assert by_ratio[0.1].p_holm == pytest.approx(2 * by_ratio[0.1].p)
    assert found.missing == () and (found.num_patients, found.num_cases) == (12, 12)
    point = next(p for p in found.points if (p.method, p.ratio) == ("scratch", 0.2))
    assert point.value == pytest.approx(np.mean(point.by_seed))
    assert point.low < point.value < point.high


def test_one_seed_is_called_untested_however_small_p_is():
    """The same effect over patients with one seed, and with three as the control."""
    told = {}
    for seeds in ([0], [0, 1, 2]):
        asked = plan(ratios=[0.1], seeds=seeds)
        told[len(seeds)] = report(asked, outcomes(asked))

    one, three = (told[number].comparisons[0] for number in (1, 3))
    assert one.p_patients < 0.001 and one.p_holm < 0.05  # would have been significant
    assert (one.significant, one.untested, one.p_seeds) == (None, "single_seed", None)
    assert (three.significant, three.untested) == (True, None)
    assert told[1].best_against_second[0].significant is None
    assert row_against_scratch(told[1])[3] == "1"
    assert row_against_scratch(told[1])[-2] == "not tested: one seed"
    assert row_against_scratch(told[3])[3] == "3"
    assert row_against_scratch(told[3])[-2] == "significant"
    assert "(1 seed) |" in render.markdown(told[1]) and "(3 seeds) |" in render.markdown(told[3])


def test_one_encoder_a_method_says_nothing_of_the_methods():
    methods = [
        {"name": "pcrl", "pretrain": PRETRAIN},
        {"name": "scratch"},
        {"name": "slow", "learning_rate": 1e-4},
    ]
    asked = plan(ratios=[0.1], methods=methods, pretrain_per="method")
    apart = plan(ratios=[0.1], methods=methods[1:], pretrain_per="method")
    each = plan(ratios=[0.1], methods=methods)

    told, control = report(asked, outcomes(asked)), report(each, outcomes(each))

    assert [one.untested for one in told.comparisons] == ["single_pretraining"] * 2
    assert all(one.significant is None and one.p_holm < 0.05 for one in told.comparisons)
    assert all(one.significant for one in control.comparisons)
    assert "hold for these encoders only" in render.markdown(told)
    assert row_against_scratch(told)[-2] == "not tested: one encoder"
    assert "these encoders only" not in render.markdown(control)
    without = report(apart, outcomes(apart))  # nothing is pretrained, so no encoder is shared
    assert without.comparisons[0].untested is None
    assert "these encoders only" not in render.markdown(without)


def row_against_scratch(told) -> list[str]:
    lines = render.markdown(told).splitlines()
    after = lines[lines.index("## pcrl against the others") :]
    row = next(line for line in after if line.startswith("| scratch |"))
    return [cell.strip() for cell in row.split("|")]


def test_the_same_results_give_the_same_report_in_any_order():
    asked = plan()
    found = outcomes(asked)

    first = report(asked, found)

    again = report(asked, dict(reversed(found.items())))
    assert first.model_dump_json() == again.model_dump_json()
    assert render.markdown(first) == render.markdown(again) and svg(first) == svg(again)
    assert first == type(first).model_validate_json(first.model_dump_json())


def test_the_table_has_the_papers_layout():
    asked = plan()

    text = render.markdown(report(asked, outcomes(asked)), curve="curve.svg")

    lines = text.splitlines()
    assert "| LUNA → LiTS | 10% | 20% |" in lines
    row = next(line for line in lines if line.startswith("| pcrl |"))
    assert row.count("**") >= 2
    assert any(line.startswith("| p-value |") for line in lines)
    assert "![Label efficiency](curve.svg)" in lines and "## Missing" not in lines


def test_what_is_missing_is_told_with_its_reason():
    asked = plan(seeds=[0, 1])
    found = outcomes(asked)
    found["pretrain/pcrl/1"] = Outcome("failed", reason="non_finite_loss: of step 3")
    for key in ("finetune/pcrl/10%/1", "finetune/pcrl/20%/1"):
        found[key] = Outcome("failed", reason="pretraining_failed: non_finite_loss")
    del found["finetune/scratch/20%/0"]

    told = report(asked, found)

    states = {one.key: one.state for one in told.missing}
    assert len(states) == 4 and states["finetune/scratch/20%/0"] == "open"
    at_10 = next(one for one in told.comparisons if one.ratio == 0.1)
    assert at_10.seeds == (0,) and at_10.p_seeds is None
    assert all(one.ratio == 0.1 for one in told.comparisons)  # at 20 % no seed is shared
    text = render.markdown(told)
    assert "| `pretrain/pcrl/1` | failed | non\\_finite\\_loss: of step 3 |" in text
    empty = report(asked, {})
    assert "Nothing yet." in render.markdown(empty) and ET.fromstring(svg(empty)) is not None


def test_cases_are_one_row_for_each_label():
    asked = plan(ratios=[0.1], seeds=[5])
    found = outcomes(asked)

    rows = render.cases_csv(asked, found).splitlines()

    assert rows[0] == "method,ratio,seed,case,patient,label,value,truth"
    assert len(rows) == 1 + 2 * 12
    table = CaseTable.of(found["finetune/pcrl/10%/5"].results)
    mine = [float(row.split(",")[6]) for row in rows if row.startswith("pcrl,")]
    assert mine == table.values[:, 0].tolist()


def test_names_cannot_leave_their_place():
    asked = plan(ratios=[0.1], seeds=[0])

    told = report(asked, outcomes(asked), name="<b>&|x", source="a|b\n# c")

    assert ET.fromstring(svg(told)).findtext("{http://www.w3.org/2000/svg}title") == "<b>&|x"
    text = render.markdown(told)
    assert "# \\<b\\>&\\|x" in text and "a\\|b \\# c → LiTS" in text
