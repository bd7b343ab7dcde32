"""De-identification where a name may hide that no table lists."""

from __future__ import annotations

import io
import json
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import BasicTextSRStorage, CTImageStorage, ExplicitVRLittleEndian

from imaging.deidentify_dicom import Cleaned, Refused, clean_object
from imaging.deidentify_formats import clean_file
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms
from imaging.intake import read_without_identity

NAMES = Pseudonyms(b"k" * 32)
SYNTAX = b"1.2.840.10008.1.2.1\0"


def ct(place: int = 0, sop_class: str = CTImageStorage, **values) -> Dataset:
    one, meta = Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID = one.SOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = f"1.2.3.777001.{place}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.file_meta = meta
    one.SeriesInstanceUID, one.StudyInstanceUID = "1.2.3.777002", "1.2.3.777003"
    one.PatientID, one.PatientName, one.Modality = "MRN1", "A^B", "CT"
    one.ImageOrientationPatient, one.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
    one.ImagePositionPatient, one.SliceThickness = [0, 0, place], 1
    one.Rows = one.Columns = 8
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation, one.SamplesPerPixel = 15, 0, 1
    one.PhotometricInterpretation = "MONOCHROME2"
    one.RescaleSlope, one.RescaleIntercept = 1, 0
    one.PixelData = bytes(128)
    for keyword, value in values.items():
        setattr(one, keyword, value)
    return one


def bytes_of(one: Dataset) -> bytes:
    target = io.BytesIO()
    pydicom.dcmwrite(target, one, enforce_file_format=True)
    return target.getvalue()


def cleaned(one: Dataset) -> bytes:
    found = clean_object(bytes_of(one), NAMES, Policy())
    assert isinstance(found, Cleaned)
    return found.data


def code(**values) -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = "SMITHJOHN", "99HOSPMRN4711"
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return Sequence([item])


@pytest.mark.parametrize(
    "hidden",
    [
        {"AnatomicRegionSequence": code()},
        {"AnatomicRegionSequence": code(CodeMeaning="Smith", CodingSchemeVersion="SMITH")},
        {"CodeValue": "SMITH"},
        {"PixelData": bytes(128) + b"SMITH JOHN"},
        {"ModalityLUTSequence": Sequence([ct(PixelData=b"SMITH JOHN")])},
    ],
    ids=["code", "meaning and version", "code at the top", "after the pixels", "pixels in an item"],
)
def test_no_corner_holds_a_name(hidden) -> None:
    one = ct(**hidden)

    assert b"SMITH" in bytes_of(one)
    assert b"SMITH" not in cleaned(one)
    assert b"4711" not in cleaned(one)


def test_pixels_and_standard_codes_stay() -> None:
    pixels = np.arange(64, dtype="<u2").tobytes()
    one = ct(PixelData=pixels, AnatomicRegionSequence=code())
    one.AnatomicRegionSequence[0].update({"CodingSchemeDesignator": "SCT"})
    one.AnatomicRegionSequence[0].CodeValue = "10200004"

    kept = pydicom.dcmread(io.BytesIO(cleaned(one)))

    assert kept.PixelData == pixels
    assert kept.AnatomicRegionSequence[0].CodeValue == "10200004"


def test_a_transfer_syntax_that_is_none_is_refused_and_not_repeated() -> None:
    data = bytes_of(ct()).replace(SYNTAX, b"1.2.840.SMITH.JOHN.1", 1)

    found = clean_object(data, NAMES, Policy())

    assert found == Refused("an unknown transfer syntax", False, found.series_uid, found.sop_uid)


@pytest.mark.parametrize(
    "risky", [{"BurnedInAnnotation": ["YES", "YES"]}, {"Modality": ["US", "CT"]}]
)
def test_several_values_hide_no_burned_in_annotation(risky) -> None:
    found = clean_object(bytes_of(ct(**risky)), NAMES, Policy())

    assert isinstance(found, Refused)
    assert found.is_quarantined


def refusal(tmp_path, members: list[bytes]) -> ScanError:
    with zipfile.ZipFile(tmp_path / "sent", "w") as archive:
        for place, data in enumerate(members):
            archive.writestr(str(place), data)
    (tmp_path / "out").mkdir()
    with pytest.raises(ScanError) as caught:
        read_without_identity(
            tmp_path / "sent", tmp_path / "out", kind="image", series_uid=None, names=NAMES,
            policy=Policy(),
        )  # fmt: skip
    return caught.value


def test_a_refusal_of_what_cannot_be_cleaned_holds_no_uid_as_it_was_sent(tmp_path) -> None:
    error = refusal(tmp_path, [bytes_of(ct(n, BasicTextSRStorage)) for n in range(2)])

    assert "sop_uid" in json.dumps(error.extra)
    assert "777001" not in json.dumps(error.extra)


def test_a_refusal_names_files_by_their_place_as_sent(tmp_path) -> None:
    slices = [ct(n) for n in range(4)]
    slices[3].ImagePositionPatient = [0, 0, 1]
    slices[3].PixelData = bytes([1]) * 128

    error = refusal(tmp_path, [b"junk", b"more junk", *map(bytes_of, slices)])

    assert (error.code, error.extra["members"]) == ("duplicate_slices", [3, 5])


def test_a_zlib_stream_holds_the_voxels_alone() -> None:
    header = (
        b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\n"
        b"Offset = 0 0 0\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
        b"ElementType = MET_UCHAR\nCompressedData = True\nModality = SMITH JOHN\n"
        b"ElementDataFile = LOCAL\n"
    )
    target = io.BytesIO()

    clean_file(io.BytesIO(header + zlib.compress(bytes(64))), target, "metaimage")
    with pytest.raises(ScanError, match="more than the voxels"):
        clean_file(
            io.BytesIO(header + zlib.compress(bytes(64) + b"SMITH")), io.BytesIO(), "metaimage"
        )

    assert b"SMITH" not in target.getvalue()
    assert target.getvalue().endswith(zlib.compress(bytes(64)))


def test_words_of_an_nrrd_are_of_its_vocabulary() -> None:
    header = (
        b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"
        b"space: left-posterior-superior\nspace origin: (0,0,0)\n"
        b"space directions: (1,0,0) (0,1,0) (0,0,1)\n"
        b'units: "SMITH" "JOHN" "1950"\nkinds: domain SMITH domain\ncenters: cell cell cell\n\n'
    )
    target = io.BytesIO()

    clean_file(io.BytesIO(header + bytes(8)), target, "nrrd")

    assert b"SMITH" not in target.getvalue()
    assert b"centers: cell cell cell" in target.getvalue()
