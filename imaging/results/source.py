"""The headers of the source series: what a result takes over from them, and where its slices lie.

Nothing of a source header is passed on as it is. A result gets fresh data sets that hold an
allow-list of attributes, each checked against its value representation (PS3.5, 6.2): what is not
valid is left empty, so that a result is valid even where its source is not, and private or free
text never travels along.

Slices are matched to the mask by their place in space alone, never by file order or numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID
from pydicom.valuerep import DSfloat

from imaging.archive import is_zip, open_members
from imaging.dicom_file import clean_uid
from imaging.dicom_header import (
    MULTI_FRAME,
    SINGLE_FRAME,
    looks_like_dicom,
    parse,
    quiet,
    sop_class_of,
)
from imaging.dicom_voxels import Source as File
from imaging.geometry import MAX_CORNER_ERROR_MM
from imaging.limits import MAX_FILE_BYTES, read_capped
from imaging.results.certificate import Labels, Mapped, corner_error_mm, sampled
from imaging.volume import Affine, Grid

CHARACTER_SET = "ISO_IR 192"
NO_FRAME_OF_REFERENCE = (
    "the source states no frame of reference; the results' own follows from its series"
)
DEIDENTIFIED_HOW = "not stated by the source"

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NEAR = 0.25
"""A slice lies on the mask's grid if no corner is farther from its voxel, in voxels."""
_SNIFF_BYTES = 132

_REQUIRED_UIDS = ("StudyInstanceUID", "SeriesInstanceUID")
_FRAME_OF_REFERENCE = "FrameOfReferenceUID"
_EMPTY_IF_ABSENT = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName", "StudyID", "PositionReferenceIndicator",
)  # fmt: skip
_IF_PRESENT = (
    "StudyDescription",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "BodyPartExamined",
)
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_TAGS = [
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "Rows", "Columns",
    "NumberOfFrames", "InstanceNumber", "SliceThickness", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod",
    "DeidentificationMethodCodeSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", *_GEOMETRY, *_REQUIRED_UIDS, _FRAME_OF_REFERENCE,
    *_EMPTY_IF_ABSENT,
    *_IF_PRESENT,
]  # fmt: skip
_GROUP_OF = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
}
_MAX_CHARACTERS = {"LO": 64, "SH": 16, "PN": 64, "CS": 16}
_SETS = {"PatientSex": {"M", "F", "O"}, "PatientIdentityRemoved": {"YES", "NO"}}
_FORMS = {
    "DA": r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])",
    "TM": r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?",
    "UI": r"(?=.{1,64}$)\d+(\.\d+)+",  # with leading zeros too: a link must be repeated as it is
    "CS": r"[A-Z0-9 _]{1,16}",
}


class SourceError(Exception):
    """A source that a DICOM result cannot refer to.

    Args:
        code: Stable slug: `source_not_found`, `source_header_unusable`.
        detail: What was found and what was expected; nothing of the patient.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class SourcePlane:
    """One slice of the source."""

    image: int
    """Place of its object among `SourceSeries.images`."""
    frame: int
    """Its frame in that object, from 0."""
    affine: Affine
    """Pixel (column, row) to RAS+ mm; the third column is the unit normal."""


@dataclass(frozen=True, slots=True)
class SourceSeries:
    """The source as results refer to it."""

    images: tuple[Dataset, ...]
    """Fresh headers without pixels, one an object: slices in their order in space."""
    planes: tuple[SourcePlane, ...]
    """Every frame of every image, image by image."""
    rows: int
    columns: int
    modality: str
    mapping: Mapped
    grid: Grid
    """The mask's."""
    notes: tuple[str, ...] = ()
    """What results state otherwise than the source, and why."""

    @property
    def is_multi_frame(self) -> bool:
        """Whether one object holds all slices."""
        return "NumberOfFrames" in self.images[0]

    def slices_of(self, mask: Labels) -> Labels:
        """The mask's labels on every plane, (S, R, C) in the order of `planes`.

        Args:
            mask: (A, B, C) on `grid`.
        """
        slices = np.zeros((len(self.planes), self.rows, self.columns), dtype=np.uint8)
        inverse = np.linalg.inv(self.grid.affine)
        for place, plane in enumerate(self.planes):
            if self.mapping == "identity":
                number = int(np.rint((inverse @ plane.affine)[2, 3]))
                slices[place] = mask[:, :, number].T  # (R, C)
            else:
                extent = (self.columns, self.rows, 1)
                slices[place] = sampled(mask, self.grid, plane.affine, extent)
        return slices


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A source object: its header as parsed, and where its frames lie."""

    header: Dataset
    affines: tuple[Affine, ...]
    rows: int
    columns: int

    @property
    def series_uid(self) -> str:
        return clean_uid(self.header.get("SeriesInstanceUID"))

    @property
    def sop_uid(self) -> str:
        return clean_uid(self.header.get("SOPInstanceUID"))


def read_source(path: Path, series_uid: str, grid: Grid, sop_uids: Sequence[str]) -> SourceSeries:
    """Find the slices that a mask belongs to in what was sent.

    Args:
        path: DICOM file, zip or folder, as it was read by the intake.
        series_uid: The series that the volume was made of.
        grid: The mask's grid, columns, rows and slices of the source.
        sop_uids: Of each file that the volume was made of, as the intake recorded them.

    Raises:
        SourceError: `source_not_found` (no slices there on the mask's grid),
            `source_header_unusable` (a header lacks what a result must repeat).
        ScanError: The file cannot be opened any more.
    """
    with quiet(), _files(path) as files:
        found = [one for file in files if (one := _candidate(file)) is not None]
    chosen = [one for one in found if one.series_uid == series_uid]
    if not chosen:
        chosen = _only_series_on(found, grid)
    wanted = set(sop_uids)
    chosen = _distinct([one for one in chosen if one.sop_uid in wanted])
    if not chosen:
        raise SourceError("source_not_found", "no slices of the scan's series in the stored file")
    if len(chosen) != len(sop_uids):
        raise SourceError(
            "source_header_unusable",
            f"{len(chosen)} of the {len(sop_uids)} images have an instance UID of their own",
        )
    on_grid = [one for one in chosen if _slices(one, grid)]
    covered = sorted(number for one in on_grid for number in _slices(one, grid))
    is_identity = len(on_grid) == len(chosen) and covered == list(range(grid.shape[2]))
    used = chosen
    if any("NumberOfFrames" in one.header for one in used) and len(used) > 1:
        raise SourceError(
            "source_header_unusable",
            f"the slices lie in {len(used)} multi-frame objects; a result refers to one",
        )
    used = sorted(used, key=lambda one: _depth(one, grid))
    _require_one(used)
    _share_measures(used)
    images = tuple(_template(one, grid, is_identity=is_identity) for one in used)
    planes = tuple(
        SourcePlane(image, frame, affine)
        for image, one in enumerate(used)
        for frame, affine in enumerate(one.affines)
    )
    first = used[0]
    return SourceSeries(
        images=images,
        planes=planes,
        rows=first.rows,
        columns=first.columns,
        modality=str(images[0].Modality),
        mapping="identity" if is_identity else "nearest",
        grid=grid,
        notes=() if clean(first.header, _FRAME_OF_REFERENCE) else (NO_FRAME_OF_REFERENCE,),
    )


@contextmanager
def _files(path: Path) -> Iterator[Sequence[File]]:
    if path.is_dir():
        yield sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        return
    with path.open("rb") as file:
        start = file.read(_SNIFF_BYTES)
    if not is_zip(start):
        yield [path]
        return
    with open_members(path) as members:
        yield members


def _candidate(file: File) -> _Candidate | None:
    """An image object; None for anything else."""
    with file.open("rb") if isinstance(file, Path) else file() as stream:
        start = stream.read(_SNIFF_BYTES)
        if not looks_like_dicom(start):
            return None
        data = read_capped(stream, MAX_FILE_BYTES, start=start)
    try:
        parsed = parse(data, specific_tags=_TAGS, stop_before_pixels=True)
        sop_class = sop_class_of(parsed)
        if sop_class not in SINGLE_FRAME | MULTI_FRAME:
            return None
        header = Dataset()  # what was parsed holds the whole file, pixels and all
        for element in parsed:
            header.add(element)
        header.SOPClassUID = sop_class
        if not header.get("SOPInstanceUID"):
            header.SOPInstanceUID = parsed.file_meta.get("MediaStorageSOPInstanceUID", "")
        num_frames = int(header.get("NumberOfFrames") or 1)
        if sop_class in SINGLE_FRAME and "NumberOfFrames" in header:
            del header.NumberOfFrames
        affines = tuple(_affine(header, frame) for frame in range(num_frames))
        return _Candidate(header, affines, int(header.Rows), int(header.Columns))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # ours, and pydicom lets a dozen error types out
        return None  # the intake left it out too


def _affine(header: Dataset, frame: int) -> Affine:
    """Pixel (column, row) of a frame to RAS+ mm (PS3.3, C.7.6.2.1.1)."""
    position, orientation, spacing = (
        np.array([float(number) for number in _value(header, frame, keyword)])
        for keyword in _GEOMETRY
    )
    along_columns, along_rows = orientation.reshape(2, 3)
    affine = np.eye(4)
    affine[:3, 0] = along_columns * spacing[1]
    affine[:3, 1] = along_rows * spacing[0]
    affine[:3, 2] = np.cross(along_columns, along_rows)
    affine[:3, 3] = position
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise ValueError("no plane")
    return _LPS_TO_RAS @ affine


def _value(header: Dataset, frame: int, keyword: str) -> Any:
    """A value of one frame: of its own group, else of the shared group, else of the object."""
    for groups, item in (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        sequence = header.get(groups)
        if sequence and item < len(sequence):
            group = sequence[item].get(_GROUP_OF[keyword])
            if group and group[0].get(keyword) is not None:
                return group[0][keyword].value
    return header.get(keyword)


def _only_series_on(found: list[_Candidate], grid: Grid) -> list[_Candidate]:
    """The one series with a slice on the mask's grid, whatever its UID; none if several have."""
    uids = {one.series_uid for one in found if _slices(one, grid)}
    return [one for one in found if {one.series_uid} == uids]


def _distinct(candidates: list[_Candidate]) -> list[_Candidate]:
    """Without copies: the same SOP instance again, or another at the place of an earlier one."""
    kept: dict[str, _Candidate] = {}
    places: set[bytes] = set()
    for one in candidates:
        uid = str(one.header.get("SOPInstanceUID", ""))
        place = (np.round(np.stack(one.affines), 3) + 0.0).tobytes()
        if uid not in kept and place not in places:
            kept[uid] = one
            places.add(place)
    return list(kept.values())


def _slices(one: _Candidate, grid: Grid) -> list[int]:
    """Numbers of the mask's slices on which the object's frames lie; none if one lies elsewhere."""
    numbers: list[int] = []
    if (one.columns, one.rows) != grid.shape[:2]:
        return []
    corners = np.array([[c, r, 0, 1] for c in (0, one.columns - 1) for r in (0, one.rows - 1)])
    for affine in one.affines:
        at = (corners @ (np.linalg.inv(grid.affine) @ affine).T)[:, :3]  # (4, 3) voxels
        number = int(np.rint(at[0, 2]))
        expected = corners[:, :3] + (0, 0, number)
        if np.abs(at - expected).max() > _NEAR or not 0 <= number < grid.shape[2]:
            return []
        numbers.append(number)
    return numbers


def _depth(one: _Candidate, grid: Grid) -> float:
    return float((np.linalg.inv(grid.affine) @ one.affines[0])[2, 3])


def _require_one(used: list[_Candidate]) -> None:
    for keyword in (*_REQUIRED_UIDS, _FRAME_OF_REFERENCE):
        if len({str(one.header.get(keyword, "")) for one in used}) > 1:
            raise SourceError(
                "source_header_unusable", f"the slices of the series differ in {keyword}"
            )


def _share_measures(used: list[_Candidate]) -> None:
    """A result states one direction and pixel size: the first slice's, if that moves no corner."""
    first = used[0]
    extent = (first.columns, first.rows, 1)
    for one in used:
        for affine in one.affines:
            as_first = first.affines[0].copy()
            as_first[:3, 3] = affine[:3, 3]
            if corner_error_mm(as_first, affine, extent) > MAX_CORNER_ERROR_MM / 2:
                raise SourceError(
                    "source_header_unusable", "the slices differ in direction or in pixel size"
                )
        if "NumberOfFrames" not in one.header:
            for keyword in ("ImageOrientationPatient", "PixelSpacing"):
                one.header[keyword] = first.header[keyword]


def _template(one: _Candidate, grid: Grid, *, is_identity: bool) -> Dataset:
    """A fresh header with what results repeat of the source and refer to in it."""
    header, made = one.header, Dataset()
    made.SpecificCharacterSet = CHARACTER_SET
    for keyword in (*_REQUIRED_UIDS, "SOPInstanceUID"):
        value = clean(header, keyword)
        if not value:
            raise SourceError("source_header_unusable", f"the source has no valid {keyword}")
        setattr(made, keyword, value)
    stated = clean(header, _FRAME_OF_REFERENCE)
    made.FrameOfReferenceUID = stated or _frame_of_reference(made.SeriesInstanceUID)
    made.SOPClassUID = header.SOPClassUID
    made.Modality = clean(header, "Modality") or "OT"
    for keyword in _EMPTY_IF_ABSENT:
        setattr(made, keyword, clean(header, keyword))
    for keyword in _IF_PRESENT:
        if value := clean(header, keyword):
            setattr(made, keyword, value)
    _state_deidentification(header, made)
    _state_compression(header, made)
    made.Rows, made.Columns = one.rows, one.columns
    made.InstanceNumber = _whole(header.get("InstanceNumber"))
    gap_mm = float(np.linalg.norm(grid.affine[:3, 2])) if is_identity else None
    thickness = _positive(_value(header, 0, "SliceThickness")) or gap_mm or 1.0
    if "NumberOfFrames" in header:
        _put_frames(one, made, thickness, gap_mm)
    else:
        made.update(_measures(header, 0, thickness, gap_mm))
        made.ImageOrientationPatient = _decimals(header.ImageOrientationPatient)
        made.ImagePositionPatient = _decimals(header.ImagePositionPatient)
    return made


def _frame_of_reference(series_uid: str) -> UID:
    """For a series that states none: the same in every result of that series."""
    digest = hashlib.sha256(f"pcrl frame of reference {series_uid}".encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


def _put_frames(one: _Candidate, made: Dataset, thickness: float, gap_mm: float | None) -> None:
    """Functional groups of an enhanced object (PS3.3, C.7.6.16): shared measures, own positions."""
    header = one.header
    made.NumberOfFrames = len(one.affines)
    shared, orientation = Dataset(), Dataset()
    orientation.ImageOrientationPatient = _decimals(_value(header, 0, "ImageOrientationPatient"))
    shared.PixelMeasuresSequence = DicomSequence([_measures(header, 0, thickness, gap_mm)])
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    made.SharedFunctionalGroupsSequence = DicomSequence([shared])
    groups = []
    for frame in range(len(one.affines)):
        position, group = Dataset(), Dataset()
        position.ImagePositionPatient = _decimals(_value(header, frame, "ImagePositionPatient"))
        group.PlanePositionSequence = DicomSequence([position])
        groups.append(group)
    made.PerFrameFunctionalGroupsSequence = DicomSequence(groups)


def _measures(header: Dataset, frame: int, thickness: float, gap_mm: float | None) -> Dataset:
    measures = Dataset()
    measures.PixelSpacing = _decimals(_value(header, frame, "PixelSpacing"))
    measures.SliceThickness = DSfloat(thickness, auto_format=True)
    if gap_mm is not None:
        measures.SpacingBetweenSlices = DSfloat(gap_mm, auto_format=True)
    return measures


def _state_deidentification(header: Dataset, made: Dataset) -> None:
    """PS3.3 C.7.1.1: who says YES must say how; a source that does not is completed."""
    items = []
    for item in header.get("DeidentificationMethodCodeSequence") or ():
        code = Dataset()
        for keyword in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"):
            setattr(code, keyword, clean(item, keyword))
        if code.CodeValue and code.CodingSchemeDesignator and code.CodeMeaning:
            items.append(code)
    if items:
        made.DeidentificationMethodCodeSequence = DicomSequence(items)
    elif made.get("PatientIdentityRemoved") == "YES" and "DeidentificationMethod" not in made:
        made.DeidentificationMethod = DEIDENTIFIED_HOW


def _state_compression(header: Dataset, made: Dataset) -> None:
    if clean(header, "LossyImageCompression") == "01":
        made.LossyImageCompression = "01"
        ratio = _positive(header.get("LossyImageCompressionRatio"))
        method = clean(header, "LossyImageCompressionMethod")
        if ratio:
            made.LossyImageCompressionRatio = DSfloat(ratio, auto_format=True)
        if method:
            made.LossyImageCompressionMethod = method


def clean(header: Dataset, keyword: str) -> str:
    """A text value that is valid for its VR and its place; empty where it is not."""
    value = header.get(keyword)
    if value is None or (not isinstance(value, str) and isinstance(value, Sequence)):
        return ""
    kind = dictionary_VR(keyword)
    text = "".join(sign for sign in str(value) if sign.isprintable() and sign != "\\").strip()
    if kind in _FORMS and not re.fullmatch(_FORMS[kind], text):
        return ""
    if keyword in _SETS and text not in _SETS[keyword]:
        return ""
    if kind == "PN":
        groups = [_person(group) for group in text.split("=")[:3]]
        return "=".join(groups)
    return text[: _MAX_CHARACTERS.get(kind, 64)]


def _person(group: str) -> str:
    """A component group of a person name: five components, 64 characters (PS3.5, 6.2.1)."""
    return "^".join(group.split("^")[:5])[: _MAX_CHARACTERS["PN"]]


def _decimals(values: Any) -> list[DSfloat]:
    """Decimal strings of at most 16 characters; sources hold longer ones."""
    return [DSfloat(float(value), auto_format=True) for value in values]


def _positive(value: Any) -> float:
    try:
        number = float(value[0] if isinstance(value, list) else value)
    except (TypeError, ValueError, IndexError):
        return 0.0
    return number if 0 < number < 1e4 else 0.0


def _whole(value: Any) -> int:
    try:
        return min(max(int(value), 1), 2**31 - 1)
    except (TypeError, ValueError):
        return 1
