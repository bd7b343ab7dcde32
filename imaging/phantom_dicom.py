"""A synthetic volume as a real DICOM CT series: what a scanner would have sent.

Axes: a slice has rows R (towards Posterior) and columns C (towards Left); the volume is (I, J, K)
in RAS+, so C runs against I and R against J. Coordinates in the files are LPS+, mm.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from imaging.volume import Volume

_INTERCEPT_HU = -1024
_LPS = np.array([-1.0, -1.0, 1.0])
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_dicom_series(volume: Volume, folder: Path, *, seed: int) -> list[Path]:
    """Write one CT Image Storage file a slice, explicit VR little endian.

    File names are in shuffled order, as they come out of an archive; `InstanceNumber` counts from
    the feet up. Patient and UIDs follow from the seed.

    Args:
        volume: HU in whole numbers from -1024 to 31743, (I, J, K).
        folder: Where to write; made if absent.
        seed: Names the patient (`PHANTOM-<seed>`) and the UIDs.

    Returns:
        The files, from the feet up.
    """
    stored = volume.voxels.astype(np.int32) - _INTERCEPT_HU
    if stored.min() < 0 or stored.max() > 0x7FFF:
        raise ValueError(f"HU {volume.voxels.min()}..{volume.voxels.max()} cannot be stored")
    folder.mkdir(parents=True, exist_ok=True)
    num_slices = volume.shape[2]
    names = np.random.default_rng(seed).permutation(num_slices)
    files = []
    for k in range(num_slices):
        slice_ = _header(volume, k, seed)
        pixels = stored[::-1, ::-1, k].T.astype("<u2")  # (R, C)
        slice_.PixelData = pixels.tobytes()
        file = folder / f"IM{names[k]:05d}"
        slice_.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def write_dicom_zip(volume: Volume, path: Path, *, seed: int) -> Path:
    """Zip the series of `write_dicom_series`; the bytes follow from the arguments."""
    with TemporaryDirectory() as folder, zipfile.ZipFile(path, "w") as archive:
        for file in sorted(write_dicom_series(volume, Path(folder), seed=seed)):
            entry = zipfile.ZipInfo(f"DICOM/{file.name}", _ZIP_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, file.read_bytes(), compresslevel=1)
    return path


def uid(seed: int, *path: object) -> UID:
    """A UID of the UUID-derived root (PS3.5 B.2) that follows from the seed."""
    digest = hashlib.sha256(f"pcrl phantom {seed} {path}".encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


def _header(volume: Volume, k: int, seed: int) -> FileDataset:
    i_step, j_step, k_step = volume.spacing_mm
    corner = volume.affine @ [volume.shape[0] - 1, volume.shape[1] - 1, k, 1]
    axes = volume.affine[:3, :2] / (i_step, j_step)

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid(seed, "instance", k)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = uid(0, "implementation")
    ct = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)

    ct.SpecificCharacterSet = "ISO_IR 192"
    ct.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ct.SOPClassUID = CTImageStorage
    ct.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ct.StudyDate = ct.SeriesDate = ct.ContentDate = "20200101"
    ct.StudyTime = ct.SeriesTime = ct.ContentTime = "120000"
    ct.AccessionNumber = ""
    ct.Modality = "CT"
    ct.Manufacturer = "Phantom"
    ct.ReferringPhysicianName = ""
    ct.StudyDescription = "Synthetic abdomen"
    ct.PatientName = f"PHANTOM^{seed}"
    ct.PatientID = f"PHANTOM-{seed}"
    ct.PatientBirthDate = ct.PatientSex = ""
    ct.PatientIdentityRemoved = "YES"
    ct.KVP = "120"
    ct.SliceThickness = f"{k_step:.6g}"
    ct.PatientPosition = "HFS"
    ct.StudyInstanceUID = uid(seed, "study")
    ct.SeriesInstanceUID = uid(seed, "series")
    ct.FrameOfReferenceUID = uid(seed, "frame")
    ct.StudyID = "1"
    ct.SeriesNumber, ct.AcquisitionNumber, ct.InstanceNumber = 2, 1, k + 1
    ct.PositionReferenceIndicator = ""
    ct.ImagePositionPatient = _decimals(corner[:3] * _LPS)
    ct.ImageOrientationPatient = _decimals([*(-axes[:, 0] * _LPS), *(-axes[:, 1] * _LPS)])
    ct.SamplesPerPixel = 1
    ct.PhotometricInterpretation = "MONOCHROME2"
    ct.Rows, ct.Columns = volume.shape[1], volume.shape[0]
    ct.PixelSpacing = _decimals([j_step, i_step])
    ct.BitsAllocated, ct.BitsStored, ct.HighBit, ct.PixelRepresentation = 16, 15, 14, 0
    ct.WindowCenter, ct.WindowWidth = "40", "400"
    ct.RescaleIntercept, ct.RescaleSlope, ct.RescaleType = str(_INTERCEPT_HU), "1", "HU"
    return ct


def _decimals(values: object) -> list[str]:
    """Decimal strings of at most 16 characters (VR DS)."""
    return [f"{value:.9g}"[:16] for value in np.asarray(values, dtype=np.float64) + 0.0]
