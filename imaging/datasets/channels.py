"""One channel of a 4D NIfTI as a volume of its own: MSD keeps MR modalities so."""

from __future__ import annotations

from pathlib import Path

from imaging import nifti


def extract(path: Path, channel: int, target: Path) -> None:
    """Write channel `channel` (A, B, C) of a 4D file on the grid of the file.

    Values are as the file means them: its slope and intercept are applied.

    Args:
        path: NIfTI of shape (A, B, C, channels).
        channel: From 0.
        target: `.nii` or `.nii.gz`; published by rename.

    Raises:
        ScanError: As `nifti.read`; `not_three_dimensional` if there is no such channel.
    """
    voxels, header = nifti.read_stored(path, channel=channel)
    draft = target.with_name(f".draft-{target.name}")
    try:
        nifti.write(draft, voxels, header.affine)
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
