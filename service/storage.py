"""The store: files named by their SHA-256, published by rename, inside the data folder.

    store/tmp/<uuid>            being written (same file system, so the rename is atomic)
    store/uploads/<id>/bytes    coming in pieces (service/uploads.py); survives a restart
    store/blobs/ab/<sha256>     a finished file; never changes
    store/bundles/<digest>/     a model bundle (models/bundle.py)
    work/<run id>/              a training run's recipe, checkpoints and events; survives a restart

Order of durability: fsync(file) -> rename -> fsync(folder) -> the caller commits its row. So a row
never lacks its file; a file may lack its row and is swept later (reliability.md, 3.4).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from models import bundle
from service import faults
from service.errors import ServiceError

HOUR_S = 3600.0


class BlobCorrupt(Exception):  # noqa: N818  # reads as what was found
    """A stored file is missing or is not what was stored."""

    code = "blob_corrupt"

    def __init__(self, sha256: str, found: str) -> None:
        super().__init__(f"blob {sha256}: {found}")
        self.sha256 = sha256


class Receiver:
    """A file being received; use as a context manager, which removes it unless committed.

    with store.receive() as writer:
        for chunk in body:
            writer.write(chunk)
        sha256, size = store.commit_blob(writer)
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path = path
        self.size = 0
        self.max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._file = path.open("xb")

    def write(self, chunk: bytes) -> None:
        """Append bytes and hash them.

        Raises:
            ServiceError: 413 `request_too_large` past `max_bytes`.
        """
        self.size += len(chunk)
        if self.max_bytes is not None and self.size > self.max_bytes:
            raise ServiceError(
                413, "request_too_large", f"more than the {self.max_bytes} bytes that are accepted"
            )
        self._hash.update(chunk)
        self._file.write(chunk)

    def close(self) -> str:
        """Flush to the disk (fsync) and return the SHA-256."""
        if not self._file.closed:
            self._file.flush()
            faults.point("blob.before_sync")
            os.fsync(self._file.fileno())  # never retried: after EIO the pages may be lost
            self._file.close()
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        finally:  # on a full disk closing fails too, and what is there must go
            self.path.unlink(missing_ok=True)


class Draft:
    """A file that comes in pieces, held by one request at a time; made by `Store.draft`.

    What lies beyond the offset that a piece begins at is the rest of one that broke off (a killed
    process cannot clean up): it is cut away.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bytes"

    @property
    def size(self) -> int:
        """Bytes that are there, whole pieces or not."""
        return self.path.stat().st_size if self.path.exists() else 0

    @contextlib.contextmanager
    def piece(self, offset: int, size: int, sha256: str) -> Iterator[Piece]:
        """Append a piece: it is kept whole and on the disk (fsync), or not at all.

        Args:
            offset: Where it begins, `self.size` at most.
            size: How many bytes it must have.
            sha256: Its digest.

        Raises:
            ServiceError: 422 `digest_mismatch` for other bytes, or fewer or more of them.
        """
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.truncate(offset)
            piece = Piece(file, size)
            try:
                yield piece
                piece.check(sha256)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(offset)
                raise
        if is_new:
            fsync(self.path.parent)
            fsync(self.path.parent.parent)

    def clear(self) -> None:
        """Forget every byte."""
        self.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file and its folder."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


class Piece:
    """A piece of a draft, being received."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        """Append bytes and hash them."""
        self._left -= len(chunk)
        if self._left < 0:
            raise ServiceError(422, "digest_mismatch", "the piece is longer than its Content-Range")
        self._hash.update(chunk)
        self._file.write(chunk)

    def check(self, sha256: str) -> None:
        """Whether all bytes came, and the right ones."""
        if self._left or self._hash.hexdigest() != sha256:
            found = f"{self._left} bytes too few" if self._left else "other bytes"
            raise ServiceError(
                422, "digest_mismatch", f"the piece came with {found}; send it again"
            )


class Store:
    """Content-addressed files of one data folder; safe to use from several processes."""

    def __init__(self, data_dir: Path, *, min_free_bytes: int = 0) -> None:
        self.data_dir = data_dir.absolute()
        self.min_free_bytes = min_free_bytes
        self.tmp = self.data_dir / "store" / "tmp"
        self.blobs = self.data_dir / "store" / "blobs"
        self.bundles = self.data_dir / "store" / "bundles"
        self.uploads = self.data_dir / "store" / "uploads"
        self.work = self.data_dir / "work"
        for folder in (self.tmp, self.blobs, self.bundles, self.uploads, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    def receive(self, *, max_bytes: int | None = None) -> Receiver:
        """Begin to receive a file of at most `max_bytes`.

        Raises:
            ServiceError: 507 `insufficient_storage` when the disk is below its watermark.
        """
        self.check_space()
        return Receiver(self.tmp / uuid.uuid4().hex, max_bytes)

    def commit_blob(self, receiver: Receiver) -> tuple[str, int]:
        """Publish a received file under its digest; storing the same bytes twice is one file.

        Returns:
            SHA-256 (hexadecimal) and size in bytes.
        """
        sha256 = receiver.close()
        self._publish(receiver.path, self.path_of(sha256))
        return sha256, receiver.size

    @contextlib.contextmanager
    def draft(self, upload_id: str) -> Iterator[Draft]:
        """The file of an upload in pieces, for this request alone, in any process.

        The lock is the kernel's (flock on the folder), so it ends with a killed process.

        Raises:
            ServiceError: 409 `upload_busy` while another request has it.
        """
        folder = self.uploads / upload_id
        folder.mkdir(exist_ok=True)
        descriptor = _locked(folder)
        if descriptor is None:
            raise ServiceError(
                409,
                "upload_busy",
                "another request is sending to this upload or completing it",
                headers={"Retry-After": "1"},
            )
        try:
            yield Draft(folder)
        finally:
            with contextlib.suppress(OSError):  # it has bytes, or is gone
                folder.rmdir()
            os.close(descriptor)

    def link_file(self, path: Path, sha256: str) -> None:
        """Store a received file under its digest, which the caller has checked; `path` stays.

        The file gets a second name (a hard link), so that whatever happens to the one, a request
        that completes an upload can be repeated from the other.
        """
        target = self.path_of(sha256)
        target.parent.mkdir(exist_ok=True)
        faults.point("blob.before_link")
        try:
            os.link(path, target)
        except FileExistsError:
            if bundle.sha256_of(target) != sha256:  # the right bytes heal what the disk spoiled
                beside = self.tmp / uuid.uuid4().hex
                os.link(path, beside)
                beside.rename(target)
        os.utime(target)  # counts as fresh for the sweep
        fsync(target.parent)
        fsync(self.blobs)

    def put_file(self, path: Path) -> tuple[str, int]:
        """Copy a file of ours (a mask, a canonical volume) into the store.

        Returns:
            SHA-256 (hexadecimal) and size in bytes.
        """
        with Receiver(self.tmp / uuid.uuid4().hex, None) as writer, _regular(path) as source:
            while chunk := source.read(1 << 20):
                writer.write(chunk)
            return self.commit_blob(writer)

    def path_of(self, sha256: str) -> Path:
        """Where the file with this digest lies (or would lie)."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ValueError(f"not a SHA-256: {sha256!r}")
        return self.blobs / sha256[:2] / sha256

    def verify(self, sha256: str) -> Path:
        """The file's path, after hashing it again.

        Raises:
            BlobCorrupt: The file is missing or its bytes have changed.
        """
        path = self.path_of(sha256)
        try:
            found = bundle.sha256_of(path)
        except FileNotFoundError:
            raise BlobCorrupt(sha256, "is missing") from None
        if found != sha256:
            raise BlobCorrupt(sha256, f"has the digest {found}")
        return path

    def delete_blob(self, sha256: str) -> bool:
        """Remove a file that no row refers to (the caller has committed that), if it is there."""
        path = self.path_of(sha256)
        existed = path.exists()
        path.unlink(missing_ok=True)
        return existed

    def publish_bundle(self, folder: Path) -> str:
        """Copy a verified bundle into the store; the same bundle twice is one folder.

        Returns:
            The bundle's digest.

        Raises:
            BundleError: The folder is not a whole bundle.
        """
        bundle.load(folder)
        digest = bundle.digest_of(folder)
        target = self.bundle_dir(digest)
        if target.exists():
            return digest
        draft = self.tmp / f"{uuid.uuid4().hex}.bundle"
        try:
            shutil.copytree(folder, draft)
            bundle.load(draft)
            for path in [*draft.iterdir(), draft]:
                fsync(path)
            faults.point("bundle.before_rename")
            draft.rename(target)
            faults.point("bundle.after_rename")
        except OSError:
            if not target.exists():  # another worker published the same bundle: fine
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        fsync(self.bundles)
        return digest

    def bundle_dir(self, digest: str) -> Path:
        """Where the bundle with this digest lies (or would lie)."""
        return self.bundles / self.path_of(digest).name

    def work_dir(self, run_id: str) -> Path:
        """The run's own folder, made on first use; the same after a restart."""
        if not run_id.replace("_", "").isalnum():
            raise ValueError(f"not a run id: {run_id!r}")
        folder = self.work / run_id
        folder.mkdir(exist_ok=True)
        return folder

    def free_bytes(self) -> int:
        """Free space on the store's file system."""
        return shutil.disk_usage(self.tmp).free

    def check_space(self) -> None:
        """Refuse new files when the disk is below its watermark.

        Raises:
            ServiceError: 507 `insufficient_storage`.
        """
        free = self.free_bytes()
        if free < self.min_free_bytes:
            raise ServiceError(
                507,
                "insufficient_storage",
                f"{free} bytes are free; at least {self.min_free_bytes} must stay free",
            )

    def sweep(self, *, older_than_s: float = 24 * HOUR_S) -> int:
        """Remove temporary files that nobody finished; returns how many."""
        return sum(_remove(path) for path in _older(self.tmp.iterdir(), older_than_s))

    def stale_drafts(self, older_than_s: float) -> list[Path]:
        """Folders of uploads in pieces into which nothing came for so long."""
        return _older(self.uploads.iterdir(), older_than_s)

    def unreferenced(self, referenced: set[str], *, older_than_s: float = 24 * HOUR_S) -> list[str]:
        """Digests of stored files that are old enough and not among `referenced`."""
        old = _older(self.blobs.glob("*/*"), older_than_s)
        return [path.name for path in old if path.name not in referenced]

    def _publish(self, draft: Path, target: Path) -> None:
        if not target.exists() or bundle.sha256_of(target) != target.name:
            target.parent.mkdir(exist_ok=True)
            faults.point("blob.before_rename")
            draft.rename(target)
            faults.point("blob.after_rename")
            fsync(target.parent)
            fsync(self.blobs)
            faults.point("blob.after_sync")
        else:
            os.utime(target)  # counts as fresh for the sweep
            draft.unlink(missing_ok=True)


def _regular(path: Path) -> BinaryIO:
    """A file that a child process wrote: no link to another one, and no pipe to wait for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None while somebody else has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # removed just now by whoever had it
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.fstat(descriptor).st_ino == folder.stat().st_ino  # else a removed one
    except OSError:
        is_there = False
    if not is_there:
        os.close(descriptor)
        return None
    return descriptor


def _older(paths: Iterable[Path], seconds: float) -> list[Path]:
    horizon = time.time() - seconds
    found = []
    for path in paths:
        try:
            if path.stat().st_mtime < horizon:
                found.append(path)
        except FileNotFoundError:
            continue  # finished or swept by someone else meanwhile
    return found


def _remove(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return True
