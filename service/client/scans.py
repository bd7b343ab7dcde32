"""Volumes and datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from service import schemas
from service.client.transport import Transport
from service.client_upload import described, send_in_pieces

PIECES_FROM_BYTES = 8 << 20
"""Smaller files are sent whole: a break costs no more than a piece."""
PATIENCE_S = 120.0
"""How long an upload goes on asking a service that does not answer."""

Classes = Mapping[str, int | None] | None
Item = (
    tuple[str, str | None]
    | tuple[str, str | None, str | None]
    | tuple[str, str | None, str | None, Classes]
)
"""Image id, labels id or None, perhaps the split or None, and perhaps classes of the whole scan."""


class Scans(Transport):
    """Scans and datasets of the service."""

    def upload(
        self,
        path: Path,
        *,
        kind: schemas.VolumeKind = "image",
        subject: str | None = None,
        series_uid: str | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> schemas.Volume:
        """Send a scan to the service.

        A file of more than `PIECES_FROM_BYTES` goes in pieces: when the connection breaks, the
        service is restarted, or this program is (and calls again), one piece is sent again.

        Args:
            path: NIfTI, zip of DICOM, or a multi-frame DICOM file; as `image_2d` a PNG, a JPEG or a
                radiograph as one DICOM file.
            kind: What the file is.
            subject: A pseudonym of the patient.
            series_uid: Which series of an archive with several.
            on_progress: Told the number of bytes that have arrived so far.
        """
        if path.stat().st_size <= PIECES_FROM_BYTES:
            return self.upload_whole(
                path, kind=kind, subject=subject, series_uid=series_uid, on_progress=on_progress
            )
        return send_in_pieces(
            self._once,
            path,
            described(kind=kind, subject=subject, series_uid=series_uid),
            on_progress=on_progress,
            patience_s=PATIENCE_S,
            complete_timeout=self._patient,
        )

    def upload_whole(
        self,
        path: Path,
        *,
        kind: schemas.VolumeKind = "image",
        subject: str | None = None,
        series_uid: str | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> schemas.Volume:
        """Send a scan in one request; a break means that all of it is sent again."""
        answer = self._send(  # the same bytes are the same volume: safe to send again
            "volumes",
            path,
            params=described(kind=kind, subject=subject, series_uid=series_uid),
            on_progress=on_progress,
        )
        return schemas.Volume.model_validate_json(answer.content)

    def volume(self, volume_id: str) -> schemas.Volume:
        """A volume by id."""
        return self._get(f"volumes/{volume_id}", schemas.Volume)

    def volumes(self, **filters: str) -> list[schemas.Volume]:
        """Every volume, newest first; filters are `kind` and `subject`."""
        return list(self._pages("volumes", schemas.VolumePage, filters))

    def download_volume(
        self,
        volume_id: str,
        path: Path,
        *,
        format: Literal["nifti", "png", "original"] | None = None,
    ) -> None:
        """Save a scan's file: a volume as NIfTI, a 2D image as PNG, or what was sent."""
        asked = "" if format is None else f"?format={format}"
        self._download(f"volumes/{volume_id}/file{asked}", path)

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume that nothing refers to."""
        self._once("DELETE", f"volumes/{volume_id}")

    def create_dataset(
        self, name: str, items: Sequence[Item], *, split: schemas.SplitCreate | None = None
    ) -> schemas.Dataset:
        """Make a dataset of scans with labels or classes."""
        body = {
            "name": name,
            "items": [
                dict(zip(("volume_id", "labels_id", "split", "classes"), item, strict=False))
                for item in items
            ],
            "split": split.model_dump(mode="json") if split is not None else None,
        }
        return self._create("datasets", body, schemas.Dataset)

    def dataset(self, dataset_id: str) -> schemas.Dataset:
        """A dataset by id."""
        return self._get(f"datasets/{dataset_id}", schemas.Dataset)

    def datasets(self) -> list[schemas.DatasetSummary]:
        """Every dataset, newest first, without items."""
        return list(self._pages("datasets", schemas.DatasetPage, {}))

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete a dataset that no run refers to."""
        self._once("DELETE", f"datasets/{dataset_id}")
