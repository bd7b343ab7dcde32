"""What a segmentation gives out: its files, each certified, and what there is not and why.

The NIfTI mask is always made. DICOM formats need a DICOM source and are written in a child process
(`imaging.results.child`), since the source's headers are hostile bytes. A mask that is not what was
computed, in any format, is a `GeometryError` and the end of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from imaging import nifti
from imaging.geometry import GeometryError
from imaging.results.certificate import Labels, certify_nifti
from imaging.results.child import Format, NotMade, Results, Written, write_results
from imaging.results.facts import Facts, Label
from imaging.volume import Grid
from models.predict import Segmentation
from service import itk_reader
from service.db import Volume
from service.formats import ARTIFACTS, DEFAULT_FORMATS, MEDIA_TYPES
from service.runs import Lease, NewArtifact
from service.storage import Store

INTENDED_USE = "research use only; not a medical device"


@dataclass(frozen=True, slots=True)
class Published:
    """Files in the store, and their lines in the result."""

    artifacts: tuple[NewArtifact, ...]
    result: dict[str, Any]
    """`certificate` (of the NIfTI mask), `files` and `not_made`."""


def publish(
    store: Store,
    folder: Path,
    *,
    lease: Lease,
    row: Volume,
    source: Grid,
    mask: Labels,
    found: Segmentation,
) -> Published:
    """Write a mask in every format asked for, prove each, and put them into the store.

    Args:
        store: Where the source lies and the files go.
        folder: Scratch.
        lease: The run: its id, its model, the formats asked for.
        row: The volume that was segmented.
        source: Its grid as sent.
        mask: (A, B, C) on that grid.
        found: What is in it.

    Raises:
        GeometryError: A file is not what was computed.
    """
    values = {name: value for value, name in enumerate(found.voxels, start=1)}
    mask_path = folder / "mask.nii.gz"
    nifti.write(mask_path, mask, source.affine, description=INTENDED_USE)
    readers = [itk_reader.read_mask] if itk_reader.can_hold(source) else []
    proven = certify_nifti(mask_path, source, mask, values, readers)
    made = _dicom(store, folder, mask_path, lease=lease, row=row, source=source, found=found)
    artifacts = [_stored(store, mask_path, "nifti")]
    files = [_line("nifti", artifacts[0], asdict(proven), ())]
    for one in made.written:
        artifacts.append(_stored(store, one.path, one.format))
        files.append(_line(one.format, artifacts[-1], one.certificate, one.notes))
    result = {
        "certificate": asdict(proven),
        "files": files,
        "not_made": [asdict(one) for one in made.not_made],
    }
    return Published(tuple(artifacts), result)


def _dicom(
    store: Store,
    folder: Path,
    mask_path: Path,
    *,
    lease: Lease,
    row: Volume,
    source: Grid,
    found: Segmentation,
) -> Results:
    formats: Sequence[Format] = lease.spec.get("formats", DEFAULT_FORMATS)
    if not formats:
        return Results((), ())
    if row.format != "dicom":
        detail = f"the scan was sent as {row.format}; the format needs a DICOM series"
        return Results((), tuple(NotMade(one, "source_not_dicom", detail) for one in formats))
    if row.original_removed_at is not None:
        detail = "the file as it was sent is no longer kept; the format needs its headers"
        return Results((), tuple(NotMade(one, "source_not_kept", detail) for one in formats))
    out = folder / "dicom"
    out.mkdir()
    made = write_results(
        store.verify(row.original_sha256),
        mask_path,
        out,
        series_uid=str(row.intake.get("series_uid", "")),
        sop_uids=[str(one["sop_uid"]) for one in row.intake.get("used", ())],
        grid=source,
        facts=_facts(lease, found),
        formats=formats,
    )
    _check_certified(made.written)
    return made


def _check_certified(written: Sequence[Written]) -> None:
    """A report has volumes and no mask; everything else came with its certificate.

    Raises:
        GeometryError: A file has none.
    """
    bare = [one.format for one in written if one.certificate is None and one.format != "dicom-sr"]
    if bare:
        raise GeometryError(f"no certificate came with {', '.join(bare)}")


def _facts(lease: Lease, found: Segmentation) -> Facts:
    model: Mapping[str, Any] = lease.spec["model"]
    labels = tuple(
        Label(name, value, found.volumes_ml[name], found.voxels[name])
        for value, name in enumerate(found.voxels, start=1)
    )
    return Facts(
        result_id=lease.run_id,
        model_name=str(model["name"]),
        model_version=str(model["version"]),
        model_digest=str(model["digest"]),
        software_version=metadata.version("pcrl"),
        labels=labels,
    )


def _stored(store: Store, path: Path, form: str) -> NewArtifact:
    return NewArtifact(ARTIFACTS[form], *store.put_file(path), MEDIA_TYPES[form])


def _line(
    form: str, artifact: NewArtifact, certificate: dict[str, Any] | None, notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "format": form,
        "media_type": artifact.media_type,
        "sha256": artifact.sha256,
        "size_bytes": artifact.size,
        "certificate": certificate,
        "notes": list(notes),
    }
