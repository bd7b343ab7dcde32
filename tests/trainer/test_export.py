"""Nothing is published that onnxruntime computes differently."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from models import bundle
from models.networks.unet3d import UNet3d
from models.recipe import FinetuneRecipe, Postprocess, PretrainRecipe
from trainer import checkpoint, export
from trainer.errors import DataError, ParityError
from trainer.methods.pcrl import Pcrl


def state_of(recipe: PretrainRecipe | FinetuneRecipe) -> checkpoint.State:
    torch.manual_seed(0)
    head = {
        "step": 5, "recipe": recipe.model_dump_json(), "recipe_digest": recipe.digest(),
        "data_digest": "d" * 64, "run_id": "", "sample": torch.rand(1, 1, 16, 16, 16).half(),
    }  # fmt: skip
    if isinstance(recipe, PretrainRecipe):
        return {**head, "method": Pcrl(recipe).state_dict()}
    network = UNet3d(1, 3, recipe.network.base_width, "group")
    metrics = {"dice_organ": {"value": 0.5, "n": 1, "split": "val"}}
    return {**head, "network": network.state_dict(), "metrics": metrics}


def test_a_segmenter_is_published_with_its_facts(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    folder = export.publish(state_of(finetune_recipe), tmp_path / "bundle", report)

    manifest = bundle.load(folder)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    logits, features = session.run(None, {"image": np.zeros((1, 1, 8, 16, 24), np.float32)})
    facts = session.get_modelmeta().custom_metadata_map
    model = onnx.load(folder / "model.onnx")
    assert logits.shape == (1, 3, 8, 16, 24) and features.shape == (1, 32)
    assert all(p.embedding_cosine > 0.9999 for p in manifest.parity if p.precision == "float32")
    assert manifest.kind == "segmenter" and manifest.labels == ("organ", "lesion")
    assert {p.input_kind for p in manifest.parity} == {"random", "real"}
    assert all(p.passed for p in manifest.parity)
    assert manifest.postprocess == Postprocess() and "postprocess" not in facts
    assert facts["labels"] == "organ,lesion" and facts["spacing_mm"] == "2,2,2"
    assert "dice_organ | 0.5000" in (folder / "card.md").read_text()
    # The exporter leaves stack traces with paths of the machine.
    assert len(model.graph.node) > 20
    assert not any(node.metadata_props for node in model.graph.node)
    assert b".py" not in (folder / "model.onnx").read_bytes()


def test_what_masks_go_through_travels_from_the_recipe_to_the_bundle_its_card_and_onnx(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    asked = Postprocess(parts={"organ": ("lesion",)}, keep_largest=("organ",), lesions=("lesion",))
    recipe = finetune_recipe.model_copy(update={"postprocess": asked})

    folder = export.publish(state_of(recipe), tmp_path / "bundle", report)

    facts = {p.key: p.value for p in onnx.load(folder / "model.onnx").metadata_props}
    assert bundle.load(folder).postprocess == asked
    assert Postprocess.model_validate_json(facts["postprocess"]) == asked
    card = (folder / "card.md").read_text()
    assert "largest component of organ; lesions counted of lesion (lesion counts as organ)" in card


def test_an_encoder_gives_the_pooled_bottleneck(
    tmp_path: Path, pretrain_recipe: PretrainRecipe, report
) -> None:
    state = state_of(pretrain_recipe)
    folder = export.publish(state, tmp_path / "bundle", report)

    network = export.restore(state, pretrain_recipe).eval()
    image = torch.rand(3, 1, 24, 16, 8)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    names = ["embedding", bundle.FEATURE_MAP]
    embedding, cells = session.run(names, {"image": image.numpy()})
    with torch.no_grad():
        expected = network.encoder(image).bottleneck.numpy()
    np.testing.assert_allclose(cells, expected, atol=1e-5)
    np.testing.assert_allclose(embedding, expected.mean((2, 3, 4)), atol=1e-5)
    assert bundle.feature_map_of(bundle.load(folder)) is not None
    assert bundle.load(folder).kind == "encoder"
    with pytest.raises(DataError, match="bundle_exists"):
        export.publish(state, tmp_path / "bundle", report)


def test_a_model_that_disagrees_leaves_no_bundle(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report, monkeypatch: pytest.MonkeyPatch
) -> None:
    faithful = export.to_onnx

    def perturbed(network: torch.nn.Module, *arguments: object) -> None:
        with torch.no_grad():  # the file gets other weights than torch has
            network.unet.out.bias += torch.tensor([0.0, 0.3, 0.0])
        faithful(network, *arguments)

    monkeypatch.setattr(export, "to_onnx", perturbed)

    with pytest.raises(ParityError) as caught:
        export.publish(state_of(finetune_recipe), tmp_path / "bundle", report)

    assert caught.value.status == 79
    assert list(tmp_path.iterdir()) == [] and report.results == []
