"""Segmentations: ask for one, look, download mask and preview, stop."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from fastapi.responses import JSONResponse

from service import db, runs, schemas
from service.formats import ARTIFACTS, MEDIA_TYPES, SUFFIXES, MaskFormat
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.routers import answers, deps, docs, files, inference, views

KIND = db.RunKind.SEGMENT

router = deps.router("segmentations")


@router.post(
    "/segmentations",
    status_code=202,
    operation_id="create_segmentation",
    summary="Segment a volume",
    response_model=schemas.Segmentation,
    responses=docs.also(200, schemas.Segmentation, "It ended within the time of `Prefer: wait`")
    | docs.problems(*inference.CREATE_PROBLEMS),
)
async def create_segmentation(
    ask: schemas.SegmentationCreate,
    caller: deps.Annotator,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
    prefer: answers.PreferOf = None,
) -> JSONResponse:
    """Queue a segmenter on an image volume."""
    work = inference.work_of(
        ask,
        caller,
        kind=KIND,
        model_kind="segmenter",
        collection="segmentations",
        view=views.segmentation,
        options={
            "formats": list(ask.formats),
            "flips": list(ask.flip_axes),
            "uncertainty": ask.uncertainty,
        },
    )
    return await answers.queue(once, caller, settings, work, view=views.segmentation, prefer=prefer)


@router.get(
    "/segmentations",
    operation_id="list_segmentations",
    summary="List segmentations, newest first",
    responses=docs.problems("invalid_request"),
)
def list_segmentations(
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
    volume_id: Annotated[schemas.VolumeId | None, Query()] = None,
    state: Annotated[schemas.State | None, Query()] = None,
) -> schemas.SegmentationPage:
    """Segmentations, perhaps of one volume or in one state."""
    page = runs.listing(
        session,
        size=page_size,
        after=cursor_of(page_token),
        kinds=[KIND],
        states=[state] if state is not None else None,
        volume_id=volume_id,
    )
    items = tuple(views.segmentation(row) for row in page.items)
    return schemas.SegmentationPage(items=items, next_page_token=token_of(page.next))


@router.get(
    "/segmentations/{segmentation_id}",
    operation_id="get_segmentation",
    summary="Get a segmentation",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_segmentation(
    segmentation_id: schemas.SegmentationId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.Segmentation:
    """A segmentation as it is now."""
    return views.segmentation(runs.get(session, segmentation_id, kinds=[KIND]))


@router.get(
    "/segmentations/{segmentation_id}/mask",
    operation_id="download_mask",
    summary="Download the mask",
    response_class=Response,
    responses=docs.file(
        "NIfTI (.nii.gz), uint8, on the grid of the scan as sent; or DICOM of the scan's own study",
        files.BYTES,
        "application/dicom",
    )
    | docs.problems(
        "invalid_request",
        "not_found",
        "not_ready",
        "format_not_made",
        "no_longer_kept",
        "blob_corrupt",
    ),
)
def download_mask(
    segmentation_id: schemas.SegmentationId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
    format: Annotated[
        MaskFormat,
        Query(
            description="`nifti`; or, of a scan sent as DICOM: the mask as `dicom-seg`, its "
            "volumes in ml as `dicom-sr` (TID 1500), its outlines as `rtstruct` (if `formats` of "
            "the request named it)."
        ),
    ] = "nifti",
) -> Response:
    """The mask in one of its formats, its bytes checked against their digest."""
    return inference.artifact(
        session,
        store,
        segmentation_id,
        ARTIFACTS[format].partition(".")[0],
        filename=f"{segmentation_id}{SUFFIXES[format]}",
        media_type=files.BYTES if format == "nifti" else MEDIA_TYPES[format],
    )


@router.get(
    "/segmentations/{segmentation_id}/preview",
    operation_id="download_preview",
    summary="Download the preview",
    response_class=Response,
    responses=docs.file("Three slices with the mask over them", "image/png")
    | docs.problems("invalid_request", "not_found", "not_ready", "no_longer_kept", "blob_corrupt"),
)
def download_preview(
    segmentation_id: schemas.SegmentationId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
) -> Response:
    """The preview picture, its bytes checked against their digest."""
    name = f"{segmentation_id}.png"
    return inference.artifact(
        session, store, segmentation_id, "preview", filename=name, media_type="image/png"
    )


@router.get(
    "/segmentations/{segmentation_id}/uncertainty",
    operation_id="download_uncertainty",
    summary="Download the map of the entropy",
    response_class=Response,
    responses=docs.file(
        "NIfTI (.nii.gz), uint8, 255 is an entropy of 1; on the grid of the scan as sent",
        files.BYTES,
    )
    | docs.problems("invalid_request", "not_found", "not_ready", "blob_corrupt", "no_longer_kept"),
)
def download_uncertainty(
    segmentation_id: schemas.SegmentationId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
) -> Response:
    """The map, if the request asked for it with `uncertainty`; its bytes checked."""
    return inference.artifact(
        session,
        store,
        segmentation_id,
        "uncertainty",
        filename=f"{segmentation_id}.uncertainty.nii.gz",
        media_type=files.BYTES,
    )


@router.post(
    "/segmentations/{segmentation_id}:cancel",
    status_code=202,
    operation_id="cancel_segmentation",
    summary="Stop a segmentation",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "run_already_ended"),
)
def cancel_segmentation(
    segmentation_id: schemas.SegmentationId, _caller: deps.Annotator, session: deps.DbSession
) -> schemas.Segmentation:
    """Ask a segmentation to end; asked again, the same answer."""
    return views.segmentation(inference.cancel(session, segmentation_id, KIND))
