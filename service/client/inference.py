"""Segmentations, embeddings, and the search for similar cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service import schemas
from service.client.runs import OnEvent, Runs
from service.formats import DicomFormat, MaskFormat


class Inference(Runs):
    """Models of the service, run on scans."""

    def segment(
        self,
        volume_id: str,
        model: str,
        *,
        formats: Sequence[DicomFormat] | None = None,
        flips: bool | Sequence[schemas.Axis] = False,
        uncertainty: bool = False,
        wait: bool = True,
        on_event: OnEvent | None = None,
    ) -> schemas.Segmentation:
        """Segment a volume, and wait for the end unless told otherwise.

        Args:
            volume_id: The scan.
            model: `models:/name@alias`, `name/version` or `name`.
            formats: Made of a DICOM scan beside the NIfTI mask; the service's choice if absent.
            flips: Axes of mirror images over which probabilities are averaged; True is all.
            uncertainty: Also make a map of the entropy (`download_uncertainty`).
            wait: Return when it has ended.
            on_event: Told every event.
        """
        body: dict[str, Any] = {"volume_id": volume_id, "model": model}
        if formats is not None:
            body["formats"] = list(formats)
        if flips is not False:
            body["flips"] = flips if isinstance(flips, bool) else list(flips)
        if uncertainty:
            body["uncertainty"] = True
        made = self._create("segmentations", body, schemas.Segmentation)
        if not wait:
            return made
        self.wait(made.id, on_event)
        return self.segmentation(made.id)

    def segmentation(self, segmentation_id: str) -> schemas.Segmentation:
        """A segmentation by id."""
        return self._get(f"segmentations/{segmentation_id}", schemas.Segmentation)

    def download_mask(
        self, segmentation_id: str, path: Path, *, format: MaskFormat = "nifti"
    ) -> None:
        """Save the mask (.nii.gz on the grid of the scan as sent), or a DICOM object of it."""
        self._download(f"segmentations/{segmentation_id}/mask?format={format}", path)

    def download_uncertainty(self, segmentation_id: str, path: Path) -> None:
        """Save the map of the entropy (.nii.gz, 255 is 1), if it was asked for."""
        self._download(f"segmentations/{segmentation_id}/uncertainty", path)

    def download_preview(self, segmentation_id: str, path: Path) -> None:
        """Save the preview picture (PNG)."""
        self._download(f"segmentations/{segmentation_id}/preview", path)

    def embed(
        self,
        volume_id: str,
        model: str,
        *,
        segmentation_id: str | None = None,
        segmenter: str | None = None,
        wait: bool = True,
        on_event: OnEvent | None = None,
    ) -> schemas.Embedding:
        """Embed a volume, and wait for the end unless told otherwise.

        Args:
            volume_id: The scan.
            model: The encoder.
            segmentation_id: Also embed the labels of this segmentation, each as a region.
            segmenter: Also embed the labels that this model finds; not with `segmentation_id`.
            wait: Return when it has ended.
            on_event: Told every event.
        """
        body = {"volume_id": volume_id, "model": model}
        if segmentation_id is not None:
            body["segmentation_id"] = segmentation_id
        if segmenter is not None:
            body["segmenter"] = segmenter
        made = self._create("embeddings", body, schemas.Embedding)
        if not wait:
            return made
        self.wait(made.id, on_event)
        return self.embedding(made.id)

    def embedding(self, embedding_id: str) -> schemas.Embedding:
        """An embedding by id."""
        return self._get(f"embeddings/{embedding_id}", schemas.Embedding)

    def similar(
        self,
        volume_id: str,
        model: str,
        *,
        region: str = "",
        limit: int = 10,
        modality: str | None = None,
        exclude_same_subject: bool = True,
    ) -> schemas.SimilarCases:
        """The volumes whose embeddings by a model are most like that of a volume.

        Args:
            volume_id: An image volume that this model has embedded.
            model: The encoder.
            region: Compare this label's embeddings instead of the whole volumes'.
            limit: The most that are given, 1 to 100.
            modality: Only of this one, such as `CT`.
            exclude_same_subject: Leave out the volume's own subject, and so the volume.
        """
        filters = {"modality": modality, "exclude_same_subject": exclude_same_subject}
        body = {
            "volume_id": volume_id,
            "model": model,
            "region": region,
            "limit": limit,
            "filters": filters,
        }
        answer = self._again("POST", "/embeddings:search", json=body)  # else a scheme
        return schemas.SimilarCases.model_validate_json(answer.content)
