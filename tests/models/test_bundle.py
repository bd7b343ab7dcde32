import json

import pytest
from pydantic import ValidationError

from models import bundle
from models.bundle import BundleError
from models.recipe import FinetuneRecipe, PretrainRecipe


@pytest.fixture
def folder(make_bundle, thresholds):
    return make_bundle(thresholds())


def test_a_saved_bundle_is_loaded_as_it_was(folder):
    manifest = bundle.load(folder)

    assert manifest.kind == "segmenter"
    assert set(manifest.files) == {bundle.MODEL, bundle.CARD}
    assert bundle.digest_of(folder) == bundle.sha256_of(folder / bundle.MANIFEST)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".bundle-")]


@pytest.mark.parametrize("name", [bundle.MODEL, bundle.CARD])
def test_a_tampered_file_is_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)

    with pytest.raises(BundleError, match="bundle_corrupt") as caught:
        bundle.load(folder)

    assert name in caught.value.detail


def test_a_missing_file_is_refused(folder):
    (folder / bundle.CARD).unlink()

    with pytest.raises(BundleError, match="bundle_corrupt"):
        bundle.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"schema_version": 2},
        {"files": {}},
        {"files": {"model.onnx": "0" * 64, "../secret": "0" * 64}},
    ],
)
def test_a_manifest_that_says_too_much_or_too_little_is_refused(folder, change):
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(BundleError, match="bundle_invalid"):
        bundle.load(folder)


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="bundle_invalid"):
        bundle.load(tmp_path)


def test_a_failed_save_leaves_nothing(folder, tmp_path):
    manifest = bundle.load(folder)
    home = tmp_path / "home"

    with pytest.raises(FileNotFoundError):
        bundle.save(home / "new", manifest, {bundle.MODEL: tmp_path / "absent"}, "card")

    assert list(home.iterdir()) == []


@pytest.mark.parametrize("recipe", [PretrainRecipe, FinetuneRecipe])
def test_a_recipe_refuses_a_field_it_does_not_know(recipe):
    known = {} if recipe is PretrainRecipe else {"labels": {"liver": 1}}
    assert recipe.model_validate(known)

    with pytest.raises(ValidationError, match=r"learning_rat\n.*Extra inputs"):
        recipe.model_validate({**known, "learning_rat": 0.1})


def test_a_recipe_refuses_an_unknown_field_deep_inside():
    with pytest.raises(ValidationError, match=r"method\.pcrl\.tau"):
        PretrainRecipe.model_validate({"method": {"tau": 0.2}})


def test_a_recipes_digest_changes_with_any_number():
    assert PretrainRecipe().digest() == PretrainRecipe().digest()
    assert PretrainRecipe(seed=1).digest() != PretrainRecipe().digest()
