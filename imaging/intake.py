"""Whatever was sent in, to one volume or one 2D image.

Formats are told by content, never by name. As a program, `python -m imaging.intake PATH --out DIR
--kind image`, it is what `imaging.sandbox` runs behind limits: it writes `DIR/volume.nii` (of a 2D
image `DIR/image.png`) and prints one JSON object, the report or the error.

Axes: volumes are (I, J, K) in RAS+; `Scan.source` keeps the grid of the files.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imaging import dicom, grey_png, nifti, volume_files
from imaging.archive import is_zip, open_members
from imaging.confine import confine
from imaging.deidentify import deidentify_upload
from imaging.dicom_file import quiet
from imaging.dicom_voxels import Source
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms
from imaging.image2d import Image2d, read_image, refuse_turned
from imaging.kinds import EXIT_BAD_SCAN, EXIT_CANNOT_WRITE, FILE_OF, Kind, VolumeKind
from imaging.limits import MAX_MEMBERS
from imaging.slices import Slices
from imaging.volume import Array, Grid, Volume
from imaging.volume_files import SNIFF_BYTES, Form

_ROUNDING = 1e-3  # labels stored as 0.99999997 exist
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_FOREIGN = {b"\x89HDF": "HDF5 (MINC 2)", b"CDF\x01": "MINC"}
_EXPECTED = "NIfTI, NRRD, MetaImage or DICOM"
_SYSTEM_FAULTS = {errno.ENOENT, errno.EACCES, errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Scan:
    """A scan that was read, with what is known of it."""

    volume: Volume
    source: Grid
    modality: str
    """As in DICOM; empty for other formats."""
    format: Literal["nifti", "nrrd", "metaimage", "dicom"]
    series_uid: str
    patient_key: str
    """Same for the same patient id, empty where none is known; key it before it is stored."""
    affine_from: Literal["sform", "qform", "nrrd", "metaimage", "dicom"]
    members: tuple[dicom.Unused, ...]
    """Files that were not used, and why."""
    used: tuple[dicom.Used, ...] = ()
    """Files that were; with `members`, every file that was sent."""
    notes: tuple[str, ...] = ()
    """What was decided or done that a reader of the volume should know."""
    slices: Slices | None = None
    """Of a DICOM series that was resampled: where its slices lie, the way back for a mask."""
    slice_files: tuple[dicom.Used, ...] = ()
    """The file of each of `slices`."""


def read_scan(
    path: Path, *, kind: VolumeKind, series_uid: str | None = None, beside: Path | None = None
) -> Scan:
    """Read a NIfTI, NRRD, MetaImage or DICOM file, a zip of files, or a folder.

    A tilted or unevenly spaced DICOM series becomes an image on a regular grid (`slices`); as
    labels it is refused, since labels cannot be interpolated.

    Args:
        path: What was sent in.
        kind: `image` gives int16 or float32 voxels; `labels` whole numbers 0..255 as uint8.
        series_uid: Which DICOM series, where there are several.
        beside: The voxels of a detached header, where `path` is one. The caller names the file;
            what the header says of it is not followed.

    Raises:
        ScanError: Any code of `docs/architecture.md`.
    """
    may_resample = kind == "image"
    with _nothing_but_scan_errors():
        if beside is None:
            scan = _read(path, series_uid, may_resample)
        else:
            scan = _from_many([path, beside], series_uid, may_resample)
        voxels = _as_labels(scan.volume.voxels) if kind == "labels" else _as_image(scan.volume)
    return replace(scan, volume=Volume(voxels, scan.volume.affine))


@contextmanager
def _nothing_but_scan_errors() -> Iterator[None]:
    """Whatever a reader raises is the scan's fault, but for faults of the system."""
    try:
        yield
    except ScanError:
        raise
    except MemoryError as error:
        raise ScanError("too_large", "reading it takes more memory than allowed") from error
    except Exception as error:  # a parser met bytes that its author did not think of
        if isinstance(error, OSError) and error.errno in _SYSTEM_FAULTS:
            raise
        raise ScanError("not_a_scan", f"the reader gave up ({type(error).__name__})") from error


def _read(path: Path, series_uid: str | None, may_resample: bool) -> Scan:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        if len(files) > MAX_MEMBERS:
            raise ScanError("too_large", f"{len(files)} files; at most {MAX_MEMBERS} are read")
        return _from_many(files, series_uid, may_resample)
    with path.open("rb") as file:
        start = file.read(SNIFF_BYTES)
    if is_zip(start):
        with open_members(path) as members:
            return _from_many(members, series_uid, may_resample)
    form = volume_files.form_of(path)
    if form is not None:
        return _from_files([path], [form], series_uid, may_resample)
    if not start:
        raise ScanError("not_a_scan", "the file is empty")
    if start.startswith(_PICTURES):
        raise ScanError("not_three_dimensional", "a PNG or JPEG picture; its kind is image_2d")
    if start[:4] in _FOREIGN:
        raise ScanError("unsupported_format", f"found {_FOREIGN[start[:4]]}; expected {_EXPECTED}")
    raise ScanError("not_a_scan", f"neither {_EXPECTED}, nor a zip of them")


def _from_many(files: Sequence[Source], series_uid: str | None, may_resample: bool) -> Scan:
    """A DICOM series among the files, or the only file of another format."""
    if not files:
        raise ScanError("empty_archive", "no files in it")
    forms = [volume_files.form_of(file) for file in files]
    if "zip" in forms:
        raise ScanError("archive_unsafe", f"file {forms.index('zip')} is itself a zip")
    return _from_files(files, forms, series_uid, may_resample)


def _from_files(
    files: Sequence[Source],
    forms: Sequence[Form | None],
    series_uid: str | None,
    may_resample: bool,
) -> Scan:
    if "dicom" in forms:
        return _from_dicom(files, series_uid, may_resample)
    places = [place for place, form in enumerate(forms) if form is not None]
    if len(places) > 1:
        raise ScanError("unsupported_format", f"{len(places)} volumes; send one at a time")
    if not places:
        raise ScanError("not_a_scan", f"none of {len(files)} files is {_EXPECTED}")
    found = volume_files.read(files, forms, places[0])
    others = [place for place in range(len(files)) if place not in found.members]
    return Scan(
        volume=found.volume,
        source=found.source,
        modality="",
        format=found.format,
        series_uid="",
        patient_key="",
        affine_from=found.affine_from,
        members=tuple(dicom.Unused(place, "not a scan") for place in others),
        used=tuple(dicom.Used(place, "") for place in found.members),
        notes=found.notes,
    )


def _from_dicom(files: Sequence[Source], series_uid: str | None, may_resample: bool) -> Scan:
    series = dicom.read_series(files, series_uid=series_uid, may_resample=may_resample)
    return Scan(
        volume=series.volume,
        source=series.source,
        modality=series.modality,
        format="dicom",
        series_uid=series.series_uid,
        patient_key=series.patient_key,
        affine_from="dicom",
        members=series.unused,
        used=series.used,
        notes=series.notes,
        slices=series.slices,
        slice_files=series.slice_files,
    )


def _as_image(volume: Volume) -> Array:
    voxels = volume.voxels
    return voxels.astype(np.int16) if voxels.dtype == np.uint8 else voxels


def _as_labels(voxels: Array) -> Array:
    """Labels (I, J, K) as uint8; values next to a whole number are rounded."""
    low, high = float(voxels.min()), float(voxels.max())
    if low < -_ROUNDING or high > 255 + _ROUNDING:
        raise ScanError(
            "labels_not_integers", f"label values run from {low:g} to {high:g}; expected 0 to 255"
        )
    labels = np.empty_like(voxels, dtype=np.uint8)
    for k in range(voxels.shape[2]):
        whole = np.rint(voxels[:, :, k])
        if np.abs(voxels[:, :, k] - whole).max() > _ROUNDING:
            raise ScanError("labels_not_integers", "label values are not whole numbers")
        labels[:, :, k] = whole
    return labels


def read(path: Path, *, kind: Kind, series_uid: str | None = None) -> Scan | Image2d:
    """What was sent in, as the kind that it is meant to be.

    Raises:
        ScanError: As `read_scan` or `image2d.read_image`; `no_such_series` where a series is named
            of a 2D image, which is one file.
    """
    if kind != "image_2d":
        return read_scan(path, kind=kind, series_uid=series_uid)
    if series_uid is not None:
        raise ScanError("no_such_series", "a 2D image is one file; there is no series to choose")
    with _nothing_but_scan_errors():
        form = volume_files.form_of(path)
        if form not in (None, "dicom"):
            raise ScanError("not_two_dimensional", f"found {form}; expected one image in one file")
        refuse_turned(path)
        return read_image(path)


def report_of(scan: Scan | Image2d) -> dict[str, Any]:
    """The facts of a scan, JSON-able; the voxels themselves are in another file (`write`)."""
    if isinstance(scan, Image2d):
        return grey_png.report_of(scan)
    return {
        "shape": scan.volume.shape,
        "spacing_mm": scan.volume.spacing_mm,
        "affine": scan.volume.affine.tolist(),
        "source_shape": scan.source.shape,
        "source_affine": scan.source.affine.tolist(),
        "modality": scan.modality,
        "format": scan.format,
        "series_uid": scan.series_uid,
        "patient_key": scan.patient_key,
        "affine_from": scan.affine_from,
        "dtype": scan.volume.voxels.dtype.name,
        "members": [asdict(member) for member in scan.members],
        "used": [asdict(member) for member in scan.used],
        "notes": list(scan.notes),
        "slices": None if scan.slices is None else _slices_record(scan),
    }


def write(path: Path, scan: Scan | Image2d) -> None:
    """Write what every later reader opens instead of what was sent in."""
    if isinstance(scan, Image2d):
        grey_png.write_png(path, scan.pixels)
    else:
        nifti.write(path, scan.volume.voxels, scan.volume.affine)


def _slices_record(scan: Scan) -> dict[str, Any]:
    """The way back to the slices that were sent; `imaging.slices.slices_of` reads it."""
    assert scan.slices is not None
    return {**scan.slices.as_json(), "files": [asdict(file) for file in scan.slice_files]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read PATH under the limits given, write what is kept of it, print the report."""
    parser = argparse.ArgumentParser(prog="python -m imaging.intake", description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="existing folder")
    parser.add_argument("--kind", choices=tuple(FILE_OF), required=True)
    parser.add_argument("--series", help="SeriesInstanceUID to read")
    parser.add_argument("--memory-bytes", type=int, help="limit of the address space")
    parser.add_argument("--cpu-s", type=int, help="limit of processor time")
    parser.add_argument("--file-bytes", type=int, help="limit of each written file")
    parser.add_argument("--open-files", type=int, help="limit of open files")
    parser.add_argument("--confine", type=int, metavar="PID", help="child of PID: see confine.py")
    parser.add_argument(
        "--deidentify", action="store_true", help="the key and the policy are on standard input"
    )
    options = parser.parse_args(arguments)
    if options.confine is not None:
        confine(
            memory_bytes=options.memory_bytes,
            cpu_s=options.cpu_s,
            file_bytes=options.file_bytes,
            open_files=options.open_files,
            parent_pid=options.confine,
            readable=[options.path],
            writable=options.out,
        )
    try:
        with quiet():
            scan, answer = _scan_and_report(options)
        write(options.out / FILE_OF[options.kind], scan)
        status = 0
    except ScanError as error:
        answer, status = _problem(error), EXIT_BAD_SCAN
    except MemoryError:
        answer, status = _problem(ScanError("too_large", "takes too much memory")), EXIT_BAD_SCAN
    except OSError as error:
        if error.errno != errno.EFBIG:
            return EXIT_CANNOT_WRITE
        answer, status = _problem(ScanError("too_large", "unpacks to too much")), EXIT_BAD_SCAN
    json.dump(answer, sys.stdout)
    return status


def _scan_and_report(options: argparse.Namespace) -> tuple[Scan | Image2d, dict[str, Any]]:
    if not options.deidentify:
        scan = read(options.path, kind=options.kind, series_uid=options.series)
        return scan, report_of(scan)
    wish = json.load(sys.stdin)
    return read_without_identity(
        options.path,
        options.out,
        kind=options.kind,
        series_uid=options.series,
        names=Pseudonyms(bytes.fromhex(wish["key"])),
        policy=Policy(**wish["policy"]),
    )


def read_without_identity(
    path: Path,
    out_dir: Path,
    *,
    kind: Kind,
    series_uid: str | None,
    names: Pseudonyms,
    policy: Policy,
) -> tuple[Scan | Image2d, dict[str, Any]]:
    """Write `out_dir/original`, the upload without identities, and read the scan from it.

    Args:
        path: What was sent in.
        out_dir: Existing folder.
        kind: As of `read`.
        series_uid: As it was sent, or as it is mapped.
        names: Gives pseudonyms.
        policy: What the site wants.

    Returns:
        The scan, and its report; `deidentified` says what was done, the patient's pseudonym and
        the mapped `series_uid` that was asked for.

    Raises:
        ScanError: As `read`; `burned_in_annotation`; `unsupported_format` for what can be
            read and not be cleaned.
    """
    if kind == "image_2d":
        refuse_turned(path)  # the copy will not tell
    cleaned = deidentify_upload(path, out_dir / "original", names, policy)
    if cleaned is None:
        try:
            read(path, kind=kind, series_uid=series_uid)  # says what is wrong with it
        except ScanError as error:
            error.extra = _mapped(error.extra, names)
            raise
        raise ScanError("unsupported_format", "a scan of a kind that cannot be de-identified")
    if series_uid is not None:
        series_uid = cleaned.series_named(series_uid, names)
    try:
        scan = read(cleaned.path, kind=kind, series_uid=series_uid)
    except ScanError as error:
        files = cleaned.explained(error.extra.pop("files", []))  # type: ignore[arg-type]
        error.extra = cleaned.as_sent(error.extra) | ({"files": files} if files else {})
        raise
    if isinstance(scan, Image2d) and cleaned.was_jpeg:
        scan = replace(scan, format="jpeg", notes=(*scan.notes, "kept as a PNG of what it shows"))
    report = report_of(scan)
    report["members"] = cleaned.explained(report["members"])
    report["used"], report["slices"] = cleaned.as_sent([report["used"], report["slices"]])
    report["deidentified"] = {
        **cleaned.facts,
        "subject": cleaned.patient_of(scan.patient_key),
        "series_uid": series_uid or "",
    }
    return scan, report


def _mapped(value: Any, names: Pseudonyms, key: str = "") -> Any:
    """What a reader of an upload that was not cleaned says, with its UIDs replaced."""
    if isinstance(value, dict):
        return {name: _mapped(part, names, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(part, names, key) for part in value]
    return names.uid(value) if key in ("sop_uid", "sop_uids", "series_uid") else value


def _problem(error: ScanError) -> dict[str, Any]:
    return {"error": {"code": error.code, "detail": error.detail, "extra": error.extra}}


if __name__ == "__main__":
    sys.exit(main())
