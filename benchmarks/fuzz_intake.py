"""Mutated files at the parsers: no crash, no hang, no error but our own (reliability.md, T-H2).

`python -m benchmarks.fuzz_intake --inputs 100000 --seed 0 --json`. Input n follows from (seed, n)
alone, so a finding is repeated by `--only n`. A child process parses; the parent notes what it
said, and when it dies or falls silent, the input it was at: native decoders may take the process
with them, which no `except` sees. Families go straight to the parsers, below the catch-all of
`imaging.intake.read_scan`; `gave_up` counts what only that catch-all turned into a refusal.

Hang: more than 2 s of processor time, or 40 s without an answer.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from benchmarks import hostile
from imaging import dicom, nifti
from imaging.errors import ScanError
from imaging.image2d import decode_image
from imaging.intake import read_scan

HANG_S = 2.0
SILENCE_S = 40.0
MEMORY_BYTES = 3 << 30
FAMILIES = ("dicom", "nifti", "zip", "picture", "intake")
CONTROLS = ("leaks", "hangs", "crashes")
_SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
_SOME = (
    b"\xff" * 4,
    bytes(4),
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\x80",
    b"\x01",
    b"\xff",
)
_TEXTS = (b"-1", b"1e999", b"nan", b"0", b"99999999999999999999", b"\\", b"\xfe\xff\x0d\xe0")

Parse = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Family:
    """Files of one kind, and what parses them."""

    seeds: tuple[bytes, ...]
    parse: Parse


@dataclass(slots=True)
class Findings:
    """What came of it."""

    num_inputs: int = 0
    crashes: list[dict[str, object]] = field(default_factory=list)
    hangs: list[dict[str, object]] = field(default_factory=list)
    foreign: list[dict[str, object]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    gave_up: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_rss_mib: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.crashes or self.hangs or self.foreign)

    def as_json(self) -> dict[str, object]:
        """The figures; at most 20 findings of each kind."""
        return {
            "inputs": self.num_inputs,
            "crashes": len(self.crashes),
            "hangs": len(self.hangs),
            "foreign_errors": len(self.foreign),
            "read": self.outcomes["read"],
            "refused": dict(sorted(self.outcomes.items() - {("read", self.outcomes["read"])})),
            "gave_up": dict(self.gave_up.most_common()),
            "slowest_s": round(self.slowest_s, 2),
            "peak_rss_mib": round(self.peak_rss_mib),
            "findings": (self.crashes + self.hangs + self.foreign)[:20],
        }


def fuzz(
    num_inputs: int, seed: int, *, families: tuple[str, ...] = FAMILIES, first: int = 0
) -> Findings:
    """Parse mutated files in a child process, and a new one after each that ended it.

    Args:
        num_inputs: How many.
        seed: With its number, makes an input.
        families: Of `FAMILIES` (or `CONTROLS`), taken in turn.
        first: Number of the first input.
    """
    found, at, end = Findings(), first, first + num_inputs
    while at < end:
        at = _one_child(found, at, end, seed, families)
    found.num_inputs = num_inputs
    return found


def _one_child(found: Findings, at: int, end: int, seed: int, families: tuple[str, ...]) -> int:
    """Run a child until it ends; returns the number of the next input."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(theirs, at, end, seed, families), daemon=True)
    child.start()
    theirs.close()
    patience_s = SILENCE_S + 60.0  # it makes the seeds first
    try:
        while at < end:
            if not ours.poll(patience_s):
                found.hangs.append({"input": at, "family": families[at % len(families)]})
                return at + 1
            outcome, error, seconds, peak_mib = ours.recv()
            if outcome == "ready":
                patience_s = SILENCE_S
                continue
            place: dict[str, object] = {"input": at, "family": families[at % len(families)]}
            _note(found, place, outcome, error, seconds)
            found.peak_rss_mib = max(found.peak_rss_mib, peak_mib)
            at += 1
    except EOFError:
        child.join()
        if patience_s > SILENCE_S:
            raise RuntimeError("the child failed while it made the seeds") from None
        found.crashes.append(
            {"input": at, "family": families[at % len(families)], "exit": child.exitcode}
        )
        return at + 1
    finally:
        child.kill()
        child.join()
        ours.close()
    return at


def _note(
    found: Findings, place: dict[str, object], outcome: str, error: str, seconds: float
) -> None:
    found.outcomes[outcome] += 1
    found.slowest_s = max(found.slowest_s, seconds)
    if outcome == "foreign":
        found.foreign.append({**place, "error": error})
    elif error:
        found.gave_up[error] += 1
    if seconds > HANG_S:
        found.hangs.append({**place, "seconds": round(seconds, 2)})


def _work(pipe: Connection, at: int, end: int, seed: int, families: tuple[str, ...]) -> None:
    """Parse inputs and say what came of each: outcome, error, processor seconds, peak MiB."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as folder:
        made = {name: family_of(name, Path(folder)) for name in families}
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print
        pipe.send(("ready", "", 0.0, 0.0))
        for number in range(at, end):
            family = made[families[number % len(families)]]
            data = input_of(family, seed, number)
            began = time.process_time()
            outcome, error = judged(family.parse, data)
            pipe.send((outcome, error, time.process_time() - began, _peak_mib()))


def _peak_mib() -> float:
    """Highest resident set since this program began; `ru_maxrss` counts its parent's too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def judged(parse: Parse, data: bytes) -> tuple[str, str]:
    """`read`, the code of a refusal, or `foreign`; and the error that was behind it."""
    try:
        parse(data)
    except ScanError as error:
        is_caught_late = error.detail.startswith("the reader gave up")
        return error.code, type(error.__cause__).__name__ if is_caught_late else ""
    except Exception as error:  # noqa: BLE001  # what the harness is for
        trace, frame = error.__traceback__, None
        while trace is not None:
            if "/imaging/" in trace.tb_frame.f_code.co_filename:
                frame = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return "foreign", f"{type(error).__name__} at {frame}"
    return "read", ""


# --- inputs


def input_of(family: Family, seed: int, number: int) -> bytes:
    """Input `number` of a family."""
    rng = np.random.default_rng([seed, number])
    original = family.seeds[int(rng.integers(len(family.seeds)))]
    if original[:2] == b"\x1f\x8b" and rng.random() < 0.7:  # else the checksum stops everything
        return gzip.compress(mutated(rng, gzip.decompress(original)), 1, mtime=0)
    if b"1.2.840.10008.1.2.1.99" in original[:400] and rng.random() < 0.7:
        start = 144 + int.from_bytes(original[140:144], "little")
        packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        inside = mutated(rng, zlib.decompress(original[start:], -zlib.MAX_WBITS))
        return original[:start] + packer.compress(inside) + packer.flush()
    return mutated(rng, original)


def mutated(rng: np.random.Generator, content: bytes) -> bytes:
    """One to eight changes: bits, extreme numbers, cuts, copies, insertions, odd texts."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        if not data:
            break
        # Half of the changes hit the first KiB, where headers are.
        reach = len(data) if rng.random() < 0.5 else min(1024, len(data))
        at = int(rng.integers(reach))
        match int(rng.integers(9)):
            case 0 | 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                some = _SOME[int(rng.integers(len(_SOME)))]
                data[at : at + len(some)] = some
            case 3:
                data[at] = int(rng.integers(256))
            case 4:
                source, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
                data[at : at + length] = data[source : source + length]
            case 5:
                source, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
                data[at:at] = data[source : source + length]
            case 6:
                del data[at : at + int(rng.integers(1, 32))]
            case 7:
                text = _TEXTS[int(rng.integers(len(_TEXTS)))]
                data[at : at + len(text)] = text
            case _:
                if rng.random() < 0.3:
                    del data[max(8, at) :]
    return bytes(data)


# --- families


def family_of(name: str, folder: Path) -> Family:
    """A family by name; its parser may use the folder."""
    match name:
        case "dicom":
            return Family(dicom_seeds(), _parse_dicom)
        case "nifti":
            return Family(nifti_seeds(), lambda data: nifti.read(_file(folder, data)))
        case "zip":
            return Family(zip_seeds(), lambda data: _read_both(_file(folder, data)))
        case "picture":
            return Family(picture_seeds(), decode_image)
        case "intake":
            everything = (*dicom_seeds(), *nifti_seeds(), *zip_seeds(), *text_seeds())
            return Family(everything, lambda data: _read_both(_file(folder, data)))
        case "leaks":
            return Family((b"x" * 64,), _leaks)
        case "hangs":
            return Family((b"x" * 64,), _hangs)
        case "crashes":
            return Family((b"x" * 64,), _crashes)
    raise ValueError(f"no family {name}")


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "input"
    path.write_bytes(data)
    return path


def _read_both(path: Path) -> None:
    read_scan(path, kind="image")
    read_scan(path, kind="labels")


def _parse_dicom(data: bytes) -> None:
    """A series of a mutated slice between two good ones, and it alone (it may be multi-frame)."""
    try:
        dicom.read_series([lambda: io.BytesIO(data)])
    except ScanError:
        good = [hostile.saved(hostile.ct(position=place)) for place in (0, 2)]
        dicom.read_series([lambda file=file: io.BytesIO(file) for file in (good[0], data, good[1])])  # type: ignore[misc]


def dicom_seeds() -> tuple[bytes, ...]:
    """Slices in every kind of transfer syntax, and an enhanced object."""
    plain = [_converted(syntax) for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian,
             ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)]  # fmt: skip
    packed = [
        hostile.saved(hostile.ct(syntax, position=1))
        for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless)
    ]
    return (*plain, *packed, hostile.saved(enhanced_ct()))


def _converted(syntax: UID) -> bytes:
    made = hostile.ct(position=1)
    if syntax == ExplicitVRBigEndian:
        made.PixelData = np.arange(4096, dtype=">u2").tobytes()
    made["PixelData"].VR = "OW"
    made.file_meta.TransferSyntaxUID = syntax
    made._is_implicit_VR = made._is_little_endian = None  # of the data set that was made, not read
    return hostile.saved(made)


def enhanced_ct() -> Dataset:
    """Three frames in one object."""
    made = hostile.ct(SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=3)
    made.PixelData = np.arange(3 * 4096, dtype="<u2").tobytes()
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(made, keyword)
    shared, measures, direction = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, direction.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [direction]
    made.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for place in range(3):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, place]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    made.PerFrameFunctionalGroupsSequence = frames
    return made


def nifti_seeds() -> tuple[bytes, ...]:
    """NIfTI-1 and -2, both byte orders, scaled, packed, with an extension."""
    voxels = np.arange(9 * 8 * 7, dtype=np.int16).reshape(9, 8, 7) % 200
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    first = nib.nifti1.Nifti1Image(voxels, affine)
    big = nib.nifti1.Nifti1Image(voxels, affine, nib.Nifti1Header(endianness=">"))
    second = nib.nifti2.Nifti2Image(voxels.astype(np.float32), affine)
    scaled = nib.nifti1.Nifti1Image(voxels, affine)
    scaled.header.set_slope_inter(0.5, -3.0)
    scaled.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of no use"))
    plain = tuple(image.to_bytes() for image in (first, big, second, scaled))
    return (*plain, gzip.compress(plain[0], mtime=0), gzip.compress(plain[2], mtime=0))


def zip_seeds() -> tuple[bytes, ...]:
    """A series, a NIfTI file, nothing."""
    slices = {f"s/{n}": hostile.saved(hostile.ct(position=n)) for n in range(3)}
    return (
        hostile.zip_of(slices),
        hostile.zip_of({"a.nii": nifti_seeds()[0], "read me": b"text"}),
        hostile.zip_of({}),
    )


def picture_seeds() -> tuple[bytes, ...]:
    """PNG of several kinds, JPEG, radiographs."""
    grey = np.arange(20 * 24, dtype=np.uint8).reshape(20, 24)
    pictures = [
        (Image.fromarray(grey), "PNG"),
        (Image.fromarray(grey.astype(np.uint16) * 100), "PNG"),
        (Image.fromarray(np.stack([grey] * 4, axis=-1)), "PNG"),
        (Image.fromarray(grey).convert("P"), "PNG"),
        (Image.fromarray(grey), "JPEG"),
        (Image.fromarray(np.stack([grey] * 3, axis=-1)), "JPEG"),
    ]
    found = []
    for picture, form in pictures:
        held = io.BytesIO()
        picture.save(held, form)
        found.append(held.getvalue())
    for syntax in (ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless):
        made = hostile.ct(syntax, SOPClassUID=DigitalXRayImageStorageForPresentation)
        made.Modality, made.WindowCenter, made.WindowWidth = "DX", 100, 50
        found.append(hostile.saved(made))
    return tuple(found)


def text_seeds() -> tuple[bytes, ...]:
    """NRRD and MetaImage with their voxels behind the header."""
    voxels = np.arange(512, dtype="<i2").tobytes()
    nrrd = (
        b"NRRD0005\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 8 8 8\n"
        b"space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (0,0,0)\nendian: little\n"
    )
    metaimage = (
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        b"CompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
        b"ElementSpacing = 1 1 2\nDimSize = 8 8 8\nElementType = MET_SHORT\n"
    )
    return (
        nrrd + b"encoding: raw\n\n" + voxels,
        nrrd + b"encoding: gzip\n\n" + gzip.compress(voxels, mtime=0),
        metaimage + b"ElementDataFile = LOCAL\n" + voxels,
    )


def _leaks(data: bytes) -> None:
    if len(data) % 2:
        raise ValueError("what a parser must not let out")


def _hangs(data: bytes) -> None:
    end = time.process_time() + HANG_S + 0.2
    while len(data) % 4 == 1 and time.process_time() < end:
        pass


def _crashes(data: bytes) -> None:
    if len(data) % 4 == 1:
        os.abort()


def main() -> None:
    """Fuzz; status 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input, by its number")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES + CONTROLS)
    parser.add_argument("--json", action="store_true", help="the default")
    options = parser.parse_args()
    count, first = (options.inputs, 0) if options.only is None else (1, options.only)
    start = time.perf_counter()
    found = fuzz(count, options.seed, families=tuple(options.families), first=first)
    seconds = round(time.perf_counter() - start, 1)
    json.dump({"seed": options.seed, "seconds": seconds, **found.as_json()}, sys.stdout)
    print(flush=True)
    sys.exit(0 if found.is_clean else 1)


if __name__ == "__main__":
    main()
