"""Models from elsewhere: what is let in keeps its digest, what is hostile is refused by name."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import onnx
import pytest
from onnx import helper

from models import bundle, compose, incoming
from models.bundle import BundleError, Parity
from models.onnx_wire import refused_operators


def zip_of(folder: Path, target: Path, prefix: str = "liver-1/", **changed: bytes | None) -> Path:
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    parts |= {name.replace("__", "."): data for name, data in changed.items()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in parts.items():
            if data is not None:
                archive.writestr(prefix + name, data)
    return target


def bare(folder: Path) -> bytes:
    """The manifest without digests, as somebody else would write it."""
    plain = json.loads((folder / bundle.MANIFEST).read_bytes())
    return json.dumps({**plain, "files": {}}).encode()


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_a_bundle_of_ours_keeps_its_digest(make_bundle, thresholds, tmp_path, out):
    folder = make_bundle(thresholds())

    found = incoming.open_in_child(zip_of(folder, tmp_path / "a.zip"), out)

    assert bundle.digest_of(found) == bundle.digest_of(folder)
    assert bundle.load(found).kind == "segmenter"


def test_a_cascade_with_its_second_network_is_let_in(make_bundle, thresholds, tmp_path, out):
    fine, coarse, folder = make_bundle(thresholds()), make_bundle(thresholds()), tmp_path / "two"
    compose.compose(folder, fine, coarse, organ="organ")

    found = incoming.open_in_child(zip_of(folder, tmp_path / "a.zip"), out)

    assert bundle.digest_of(found) == bundle.digest_of(folder)
    assert bundle.COARSE in bundle.load(found).files


def test_a_float16_network_is_let_in_with_its_record_and_not_without(
    make_bundle, thresholds, tmp_path, out
):
    folder = make_bundle(thresholds())
    manifest = bundle.load(folder)
    record = Parity(
        input_kind="random",
        shape=(1, 1, 16, 16, 8),
        provider="CPUExecutionProvider",
        max_abs_difference=0.0,
        tolerance=0.1,
        precision="float16",
        passed=True,
    )
    made = {}
    for name, parity in (("with", (record,)), ("without", ())):
        files = dict.fromkeys((bundle.MODEL, bundle.MODEL_FLOAT16), folder / bundle.MODEL)
        made[name] = tmp_path / name
        bundle.save(made[name], manifest.model_copy(update={"parity": parity}), files, "# A card")
    (out / "other").mkdir()

    found = incoming.open_in_child(zip_of(made["with"], tmp_path / "a.zip"), out)
    with pytest.raises(BundleError) as refused:
        incoming.open_in_child(zip_of(made["without"], tmp_path / "b.zip"), out / "other")

    assert bundle.digest_of(found) == bundle.digest_of(made["with"])
    assert refused.value.code == "precision_unavailable"


def test_a_bare_model_in_a_tar_is_completed_with_digests_and_a_card(
    make_bundle, thresholds, tmp_path, out
):
    folder = make_bundle(thresholds())
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (
            (bundle.MODEL, (folder / bundle.MODEL).read_bytes()),
            (bundle.MANIFEST, bare(folder)),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

    found = incoming.open_in_child(path, out)

    assert set(bundle.load(found).files) == {bundle.MODEL, bundle.CARD}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"model__onnx": b"not a protobuf"}, "bundle_corrupt"),
        ({"model__onnx": None}, "import_refused"),
        ({"manifest__json": None}, "import_refused"),
        ({"manifest__json": b"{}"}, "bundle_invalid"),
        ({"weights__pt": pickle.dumps({})}, "import_refused"),
        ({"weights__safetensors": pickle.dumps({"a": 1})}, "import_refused"),
    ],
)
def test_what_is_not_a_bundle_is_refused_by_name(
    make_bundle, thresholds, tmp_path, out, changed, code
):
    path = zip_of(make_bundle(thresholds()), tmp_path / "a.zip", **changed)

    with pytest.raises(BundleError) as refused:
        incoming.open_in_child(path, out)

    assert refused.value.code == code
    assert not (out / "bundle").exists()


def test_names_that_climb_are_refused_and_write_nothing(make_bundle, thresholds, tmp_path, out):
    path = zip_of(make_bundle(thresholds()), tmp_path / "a.zip", prefix="../../")

    with pytest.raises(BundleError) as refused:
        incoming.open_in_child(path, out)

    assert refused.value.code == "archive_unsafe"
    assert not (tmp_path / bundle.MODEL).exists()


def test_a_loop_is_refused(make_bundle, endless, tmp_path, out):
    folder = make_bundle(endless)

    with pytest.raises(BundleError) as refused:
        incoming.open_in_child(zip_of(folder, tmp_path / "a.zip"), out)

    assert (refused.value.code, "Loop" in refused.value.detail) == ("import_refused", True)


def test_a_bomb_is_refused(make_bundle, thresholds, tmp_path, out):
    folder = make_bundle(thresholds())
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(bundle.MODEL, bytes(64 << 20))
        archive.writestr(bundle.MANIFEST, (folder / bundle.MANIFEST).read_bytes())

    with pytest.raises(BundleError) as refused:
        incoming.open_in_child(path, out)

    assert "times its size" in refused.value.detail


def test_operators_of_other_domains_are_told(thresholds):
    model = thresholds()
    assert refused_operators(model.SerializeToString()) == []

    model.graph.node.append(helper.make_node("Evil", ["logits"], ["more"], domain="com.other"))

    assert refused_operators(model.SerializeToString()) == ["com.other:Evil"]
    assert isinstance(model, onnx.ModelProto)
