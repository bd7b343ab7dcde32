"""Presets fill in what was not given, and the recipe says what contradicts."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from models.presets import PRESETS
from models.recipe import CropPairs, Pcrl, PretrainRecipe, PretrainRecipe2d


def recipe(preset: str = "paper", **method: Any) -> PretrainRecipe:
    return PretrainRecipe.model_validate({"method": {"preset": preset, **method}})


def test_nothing_given_is_the_paper() -> None:
    assert PretrainRecipe() == recipe("paper") == PretrainRecipe.model_validate({})
    method, crops = PretrainRecipe().method, PretrainRecipe().crops
    assert (method.attention, method.post_conv, method.projector_input) == ("outer", True, "post")
    assert (method.reconstructions, method.push) == (("o", "m", "h"), ("query", "key", "hybrid"))
    assert (method.ema_momentum, crops.min_iou, crops.shuffle_probability) == (0.99, 0.2, 0.0)
    assert PretrainRecipe().batch_size == 32


@pytest.mark.parametrize("preset", ["official", "recommended"])
@pytest.mark.parametrize(("kind", "suffix"), [(PretrainRecipe, ""), (PretrainRecipe2d, "_2d")])
def test_a_preset_fills_in_method_crops_and_optimizer(kind: Any, suffix: str, preset: str) -> None:
    filled, plain = (
        kind.model_validate({"method": {"preset": name}}).model_dump() for name in (preset, "paper")
    )

    for section in ("method", "crops", "recipe"):
        name_of = section if section == "method" else section + suffix
        ours, papers = (r if section == "recipe" else r[section] for r in (filled, plain))
        for name, value in PRESETS[preset][name_of].items():
            assert ours[name] == value, name
            assert papers[name] != value, f"{name} repeats the paper's value"
    assert filled["method"]["temperature"] == plain["method"]["temperature"]


def test_a_given_field_wins_over_the_preset() -> None:
    given = {
        "method": {"preset": "official", "ema_momentum": 0.5, "target": "clean"},
        "crops": {"min_iou": 0.3, "max_tissue": None},
        "batch_size": 8,
    }

    filled = PretrainRecipe.model_validate(given)

    assert (filled.method.ema_momentum, filled.method.target) == (0.5, "clean")
    assert (filled.crops.min_iou, filled.crops.max_tissue, filled.batch_size) == (0.3, None, 8)
    assert filled.method.contrast_loss == "nce" and filled.crops.flip_axes == ("i",)


def test_a_given_value_wins_even_where_it_is_the_papers() -> None:
    filled = recipe("official", attention="outer", post_conv=True)

    assert (filled.method.attention, filled.method.post_conv) == ("outer", True)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_dumped_recipe_is_whole_and_comes_back_as_itself(preset: str) -> None:
    filled = recipe(preset, temperature=0.3)
    dumped = json.loads(filled.model_dump_json())

    again = PretrainRecipe.model_validate(dumped)
    elsewhere = dict(dumped, method={**dumped["method"], "preset": "recommended"})

    assert again == filled and again.digest() == filled.digest()
    assert PretrainRecipe.model_validate_json(filled.model_dump_json()) == filled
    renamed = PretrainRecipe.model_validate(elsewhere)
    assert renamed.model_dump(exclude={"method": {"preset"}}) == filled.model_dump(
        exclude={"method": {"preset"}}
    )
    assert recipe(preset).digest() != filled.digest()


def test_presets_have_digests_of_their_own() -> None:
    assert len({recipe(preset).digest() for preset in PRESETS}) == 3


def test_parts_made_in_python_are_taken_as_they_are() -> None:
    method = Pcrl(preset="official")

    filled = PretrainRecipe(method=method, crops=CropPairs())

    assert method.contrast_loss == "nce"
    assert filled.method == method and filled.batch_size == 16
    assert filled.crops == CropPairs()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"preset": "faithful"}, "'paper', 'official', 'recommended'"),
        ({"preset": ["paper"]}, "'paper', 'official', 'recommended'"),
        ({"preset": "official", "mask_same_scan": True}, "mask_same_scan needs embeddings of one"),
        ({"preset": "official", "projector_input": "post"}, "need projector_input 'pre'"),
        ({"preset": "recommended", "outer_rank": 8}, "outer_rank belongs to attention 'outer'"),
        ({"preset": "paper", "push": ["mixup_key"]}, "only the pass over the mixed batch makes"),
        ({"preset": "paper", "push": ["key", "key"]}, "push names one thing twice"),
        ({"preset": "paper", "reconstructions": []}, "if and only if reconstructions is empty"),
        ({"preset": "paper", "queue_size": 64}, "queue_size 64 is below the 96 vectors"),
        ({"preset": "recommended", "queue_size": 31}, "queue_size 31 is below the 32 vectors"),
        ({"contrast_weight": 0, "reconstruction_weight": 0}, "are both 0"),
        ({"crossmix": "during_attention"}, "'before_attention' or 'after_attention'"),
        ({"lam_fold": True}, "Extra inputs are not permitted"),
    ],
)
def test_contradictions_are_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PretrainRecipe.model_validate({"method": fields})


def test_what_is_no_contradiction_passes() -> None:
    """Negative control for the refusals above."""
    assert recipe("paper", mask_same_scan=True).method.mask_same_scan
    assert recipe("recommended", outer_rank=8, attention="outer").method.outer_rank == 8
    pushes = {"push": ["mixup_key"], "reconstructions": ["o", "mixup_o"]}
    assert recipe("paper", **pushes).method.has_mixup_pass
    assert not recipe("paper").method.has_mixup_pass
    assert recipe("recommended", queue_size=32).method.queue_size == 32


def test_the_officials_tissue_rule_needs_a_window_that_knows_tissue() -> None:
    fields = {"method": {"preset": "official"}, "preprocessing": {"intensity": {"kind": "zscore"}}}

    with pytest.raises(ValidationError, match="max_tissue needs a window"):
        PretrainRecipe.model_validate(fields)

    off = PretrainRecipe.model_validate({**fields, "crops": {"max_tissue": None}})
    assert off.crops.max_tissue is None and off.crops.min_iou == 0.25


@pytest.mark.parametrize("method", [None, 3, "pcrl", []])
def test_a_method_that_is_no_object_is_refused(method: object) -> None:
    with pytest.raises(ValidationError):
        PretrainRecipe.model_validate({"method": method})
