"""The formats in which a segmentation leaves: their names, files and media types."""

from __future__ import annotations

from typing import Literal

DicomFormat = Literal["dicom-seg", "dicom-sr", "rtstruct"]
MaskFormat = Literal["nifti", "dicom-seg", "dicom-sr", "rtstruct"]

ARTIFACTS = {
    "nifti": "mask.nii.gz",
    "dicom-seg": "seg.dcm",
    "dicom-sr": "sr.dcm",
    "rtstruct": "rtstruct.dcm",
}
"""The run's artifact that holds each format."""

SUFFIXES = {
    "nifti": ".nii.gz",
    "dicom-seg": ".seg.dcm",
    "dicom-sr": ".sr.dcm",
    "rtstruct": ".rtstruct.dcm",
}
"""What a download's name ends in."""

MEDIA_TYPES = {
    "nifti": "application/gzip",
    "dicom-seg": "application/dicom",
    "dicom-sr": "application/dicom",
    "rtstruct": "application/dicom",
}

DEFAULT_FORMATS: tuple[DicomFormat, ...] = ("dicom-seg", "dicom-sr")
"""Made of a DICOM scan unless the request says otherwise; NIfTI always is."""
