"""The program that `imaging.results.child` runs behind limits; prints one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from imaging import nifti
from imaging.confine import confine
from imaging.dicom_header import quiet
from imaging.errors import ScanError
from imaging.geometry import GeometryError
from imaging.results import readback
from imaging.results.certificate import Certificate, Labels
from imaging.results.facts import Facts, Label
from imaging.results.report import write_report
from imaging.results.segmentation import write_segmentation
from imaging.results.source import SourceError, SourceSeries, read_source
from imaging.results.structure_set import write_structure_set
from imaging.volume import Grid

EXIT_NOT_CERTIFIED = 66
_NAMES = {"dicom-seg": "seg.dcm", "dicom-sr": "sr.dcm", "rtstruct": "rtstruct.dcm"}


def write_all(job: dict[str, Any], source_path: Path, mask_path: Path, out: Path) -> dict[str, Any]:
    """Write and certify what `job` asks for; see `imaging.results.child.write_results`.

    Returns:
        `files` that were written, and `not_made` with a code and a detail for each that was not.

    Raises:
        GeometryError: A file that was written is not what was computed.
    """
    facts = Facts(
        **{**job["facts"], "labels": tuple(Label(**label) for label in job["facts"]["labels"])}
    )
    grid = Grid(tuple(job["shape"]), np.array(job["affine"], dtype=np.float64))
    mask, _ = nifti.read_stored(mask_path)
    labels: Labels = mask.astype(np.uint8, copy=False)
    try:
        source = read_source(source_path, job["series_uid"], grid, job["sop_uids"])
    except (SourceError, ScanError) as error:
        return {"files": [], "not_made": _each(job["formats"], error.code, error.detail)}
    return _Writer(source, labels, facts, out).write(job["formats"])


class _Writer:
    """Writes each format once; the report needs the segmentation, asked for or not."""

    def __init__(self, source: SourceSeries, mask: Labels, facts: Facts, out: Path) -> None:
        self._source, self._mask, self._facts, self._out = source, mask, facts, out
        self._names = {label.shown: label.value for label in facts.labels}
        self._seg: Dataset | None = None

    def write(self, formats: list[str]) -> dict[str, Any]:
        """Write the formats asked for, in the order of `_NAMES`.

        Raises:
            GeometryError: A file is not what was computed.
        """
        files: list[dict[str, Any]] = []
        not_made: list[dict[str, str]] = []
        for form, name in _NAMES.items():
            if form not in formats:
                continue
            if form != "dicom-sr" and not self._facts.found:
                not_made += _each([form], "nothing_found", "no label has a voxel in this scan")
                continue
            try:
                self._write(form, self._out / name)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001  # highdicom's checks raise a dozen types
                detail = f"the source's headers do not allow it ({type(error).__name__})"
                not_made += _each([form], "source_header_unusable", detail)
                continue
            proven = self._certified(form, self._out / name)
            files.append(
                {
                    "format": form,
                    "name": name,
                    "certificate": asdict(proven) if proven else None,
                    "notes": self._source.notes,
                }
            )
        return {"files": files, "not_made": not_made}

    def _write(self, form: str, path: Path) -> None:
        if form != "rtstruct" and self._seg is None and self._facts.found:
            seg_path = self._out / _NAMES["dicom-seg"]
            self._seg = write_segmentation(seg_path, self._source, self._mask, self._facts)
            del self._seg.PixelData  # written; the report needs the header alone
        if form == "dicom-sr":
            write_report(path, self._source, self._seg, self._facts)
        elif form == "rtstruct":
            write_structure_set(path, self._source, self._mask, self._facts)

    def _certified(self, form: str, path: Path) -> Certificate | None:
        """As `_certify`; whatever goes wrong with reading a result back, it is not certified."""
        try:
            return self._certify(form, path)
        except (GeometryError, MemoryError):
            raise
        except Exception as error:
            what = f"the {form} cannot be read back ({type(error).__name__})"
            raise GeometryError(what) from error

    def _certify(self, form: str, path: Path) -> Certificate | None:
        """The certificate of a mask; of a report that of the segmentation that it refers to."""
        if form == "rtstruct":
            return readback.certify_structure_set(path, self._source, self._mask, self._names)
        if self._seg is None:
            return None
        seg_path = self._out / _NAMES["dicom-seg"]
        proven = readback.certify_segmentation(seg_path, self._source, self._mask, self._names)
        return proven if form == "dicom-seg" else None


def _each(formats: list[str], code: str, detail: str) -> list[dict[str, str]]:
    return [{"format": form, "code": code, "detail": detail} for form in formats]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results of JOB under the limits given, print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m imaging.results", description=main.__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("mask", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--cpu-s", type=int, required=True)
    parser.add_argument("--file-bytes", type=int, required=True)
    parser.add_argument("--open-files", type=int, required=True)
    parser.add_argument("--confine", type=int, required=True, metavar="PID", help="child of PID")
    options = parser.parse_args(arguments)
    confine(
        memory_bytes=options.memory_bytes,
        cpu_s=options.cpu_s,
        file_bytes=options.file_bytes,
        open_files=options.open_files,
        parent_pid=options.confine,
        readable=[options.source, options.mask],
        writable=options.out,
    )
    job = json.loads(options.job.read_bytes())
    try:
        with quiet():
            answer = write_all(job, options.source, options.mask, options.out)
    except GeometryError as error:
        json.dump({"detail": str(error)}, sys.stdout)
        return EXIT_NOT_CERTIFIED
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
