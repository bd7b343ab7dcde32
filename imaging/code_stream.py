"""How large a compressed frame says it is, before a decoder believes it.

A damaged or hostile stream may declare 65535 x 65535 pixels in a frame of 64 x 64: native decoders
then take gigabytes, or seconds over noise. Read are JPEG and JPEG-LS (ITU-T T.81 B.2.2, T.87 C.2.2:
the frame header, marker SOFn) and JPEG 2000 (T.800 A.5.1: marker SIZ); others have no size of their
own, or are judged by their decoder.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from imaging.errors import ScanError

_SOI, _J2K = b"\xff\xd8", b"\xff\x4f\xff\x51"
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_MAX_SEGMENTS = 1000


def declared_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG, JPEG-LS or JPEG 2000 stream; None where it does not say."""
    if frame[:4] == _J2K and len(frame) >= 24:
        right, bottom, left, top = struct.unpack(">4I", frame[8:24])
        return bottom - top, right - left
    if frame[:2] != _SOI:
        return None
    at = 2
    for _ in range(_MAX_SEGMENTS):
        head = frame[at : at + 9]
        if len(head) < 9 or head[0] != 0xFF:
            return None
        if head[1] == 0xFF:  # fill bytes may come before a marker
            at += 1
        elif head[1] in _FRAME_HEADERS:
            rows, columns = struct.unpack(">2H", head[5:9])
            return rows, columns
        else:
            at += 2 if head[1] in _ALONE else 2 + int.from_bytes(head[2:4], "big")
    return None


def is_cut_off(frame: bytes) -> bool:
    """Whether a JPEG-LS stream lacks its end marker.

    CharLS spends seconds on the missing rest of a frame of 64 x 64 (found by fuzzing). Other
    decoders report it at once, and some senders leave the end of a JPEG out.
    """
    is_jpeg_ls = frame[:2] == _SOI and b"\xff\xf7" in frame[:1024]
    return is_jpeg_ls and not frame[-64:].rstrip(b"\0").endswith(b"\xff\xd9")


def check_frames(frames: Iterable[bytes], rows: int, columns: int) -> None:
    """Refuse streams that are larger than the header of their object, or cut off.

    Raises:
        ScanError: `truncated_file`.
    """
    for frame in frames:
        if is_cut_off(frame):
            raise ScanError("truncated_file", "a compressed frame is cut off")
        found = declared_size(frame)
        if found is not None and (found[0] > rows or found[1] > columns):
            raise ScanError(
                "truncated_file",
                f"a compressed frame says {found[1]} x {found[0]} pixels, its header "
                f"{columns} x {rows}",
            )
