"""2D images by the REST API: sent, listed, downloaded, deleted; never taken for a volume."""

import base64
import hashlib
import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

RAMP = np.arange(40 * 36, dtype=np.uint16).reshape(40, 36)


def png(seed: int, *, comment: str = "") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 36), dtype=np.uint8)
    held, notes = io.BytesIO(), PngInfo()
    notes.add_text("Comment", comment)
    Image.fromarray(pixels).save(held, "PNG", pnginfo=notes)
    return held.getvalue()


def radiograph() -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        setattr(dataset, name, generate_uid(entropy_srcs=[name]))
    dataset.Modality, dataset.PatientID, dataset.PatientName = "CR", "MRN-4711", "Doe^Jane"
    dataset.Rows, dataset.Columns = RAMP.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME1"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = RAMP.tobytes()
    held = io.BytesIO()
    pydicom.dcmwrite(held, dataset, enforce_file_format=True)
    return held.getvalue()


def sent(api, data: bytes, **params) -> dict:
    answer = api.upload(data, **{"kind": "image_2d", **params})
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_picture_is_described_listed_downloaded_and_deleted(api):
    data = png(1, comment="Doe^Jane")
    assert b"Doe^Jane" in data  # the control

    body = sent(api, data, subject="film-1")

    assert (body["kind"], body["format"], body["subject"]) == ("image_2d", "png", "film-1")
    assert (body["shape"], body["source_shape"]) == ([40, 36], [40, 36])
    assert body["spacing_mm"] is body["affine"] is body["source_affine"] is None
    path = f"/volumes/{body['id']}"
    assert api("GET", path).json() == body
    listed = {kind: api("GET", f"/volumes?kind={kind}&page_size=500").json()["items"]
              for kind in ("image", "image_2d")}  # fmt: skip
    assert body in listed["image_2d"]
    assert body["id"] not in {one["id"] for one in listed["image"]}
    kept = api("GET", f"{path}/file")
    original = api("GET", f"{path}/file?format=original")
    np.testing.assert_array_equal(pixels_of(kept.content), pixels_of(data))
    assert b"Doe^Jane" not in kept.content + original.content
    assert kept.headers["content-disposition"].endswith('.png"')
    assert body["sha256"] == hashlib.sha256(original.content).hexdigest()
    assert api("DELETE", path).status_code == 204
    assert api("GET", path).status_code == 404


def test_a_download_in_the_other_form_is_refused(api, world):
    image = sent(api, png(2))

    for volume_id, wrong, right in ((image["id"], "nifti", "png"), (world.image, "png", "nifti")):
        refused = api("GET", f"/volumes/{volume_id}/file?format={wrong}")
        assert (refused.status_code, refused.json()["code"]) == (409, "format_not_made")
        assert api("GET", f"/volumes/{volume_id}/file?format={right}").status_code == 200


def test_the_same_picture_again_is_the_same_image_and_as_a_volume_nothing(api):
    first = api.upload(png(3), kind="image_2d")
    again = api.upload(png(3), kind="image_2d")
    before = api.counts()

    as_volume = api.upload(png(3))

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert (as_volume.status_code, as_volume.json()["code"]) == (422, "not_three_dimensional")
    assert api.counts() == before


def test_a_radiograph_is_kept_without_its_patient_and_as_it_is_shown(api):
    body = sent(api, radiograph())

    assert (body["modality"], body["format"], body["num_used"]) == ("CR", "dicom", 1)
    assert body["subject"].startswith("sub_")
    assert "MONOCHROME1: mirrored" in body["notes"]
    original = api("GET", f"/volumes/{body['id']}/file?format=original").content
    assert not {b"MRN-4711", b"Doe^Jane"} & {part for part in (b"MRN-4711", b"Doe^Jane")
                                             if part in original}  # fmt: skip
    assert pydicom.dcmread(io.BytesIO(original)).PatientIdentityRemoved == "YES"
    shown = pixels_of(api("GET", f"/volumes/{body['id']}/file").content)
    np.testing.assert_array_equal(shown, RAMP.max() - RAMP)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda scans: scans.nifti, "not_two_dimensional"),
        (lambda scans: scans.zipped, "not_two_dimensional"),
        (lambda scans: png(4)[:200], "truncated_file"),
        (lambda scans: b"a letter" * 99, "not_a_scan"),
    ],
    ids=["NIfTI", "zip of CT", "cut", "text"],
)
def test_what_is_no_2d_image_leaves_nothing(api, scans, make, code):
    before = api.counts()

    refused = api.upload(make(scans), kind="image_2d")

    assert (refused.status_code, refused.json()["code"]) == (422, code)
    assert api.counts() == before


def test_a_series_of_a_2d_image_cannot_be_chosen(api):
    refused = api.upload(png(5), kind="image_2d", series_uid="1.2.3")

    assert (refused.status_code, refused.json()["code"]) == (422, "no_such_series")


def test_a_2d_image_comes_in_pieces_too(api):
    data = png(6)
    digest = hashlib.sha256(data)
    wanted = {"size_bytes": len(data), "sha256": digest.hexdigest(), "kind": "image_2d"}
    begun = api("POST", "/uploads", json=wanted).json()
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}",
        "Content-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:",
    }

    api("PUT", f"/uploads/{begun['id']}", content=data, headers=headers)
    made = api("POST", f"/uploads/{begun['id']}:complete")

    assert made.status_code == 201, made.text
    assert (made.json()["kind"], made.json()["shape"]) == ("image_2d", [40, 36])


@pytest.mark.parametrize("path", ["/segmentations", "/embeddings"])
def test_a_2d_image_is_refused_where_a_volume_is_served(api, world, path):
    image = sent(api, png(7))["id"]
    model = {"/segmentations": world.segmenter, "/embeddings": world.encoder}[path]
    before = api.counts()

    refused = api("POST", path, json={"volume_id": image, "model": model})

    assert (refused.status_code, refused.json()["code"]) == (422, "wrong_volume_kind")
    assert image in refused.json()["detail"]
    assert api.counts()["run"] == before["run"]
    accepted = api("POST", path, json={"volume_id": world.image, "model": model})
    assert accepted.status_code == 202  # the control
