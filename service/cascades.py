"""Register a cascade made of registered segmenters (`models.compose`)."""

from __future__ import annotations

import shutil
import uuid

from sqlalchemy.orm import Session

from models import bundle, compose
from models.bundle import BundleError
from service import registry
from service.db import ModelVersion
from service.errors import ServiceError
from service.schemas import CascadeCreate
from service.storage import Store


def create(session: Session, store: Store, name: str, ask: CascadeCreate) -> ModelVersion:
    """Compose a bundle, store it, and add it as the next version of a model; the caller commits.

    Args:
        session: Database session.
        store: Where the bundles lie.
        name: The model that gets the version; it need not be one of the two.
        ask: What to make it of.

    Raises:
        ServiceError: 404 `not_found`, 422 `wrong_model_kind`, 422 `invalid_request`,
            507 `insufficient_storage`.
        BundleError: A stored model is not what was stored.
    """
    store.check_space()
    registry.check_name(session, name, "segmenter")
    fine = registry.resolve(session, ask.fine)
    coarse = registry.resolve(session, ask.coarse) if ask.coarse is not None else None
    finder = coarse or fine
    known = list(finder.manifest.get("labels", ()))
    if not {ask.organ, *(ask.parts or ())} <= set(known):
        raise ServiceError(
            422,
            "invalid_request",
            "organ or parts name what the model that looks for the organ does not segment; "
            f"it has {', '.join(known) or 'no labels'}",
        )
    draft = store.tmp / f"{uuid.uuid4().hex}.cascade"
    try:
        compose.compose(
            draft,
            store.bundle_dir(fine.digest),
            store.bundle_dir(coarse.digest) if coarse is not None else None,
            organ=ask.organ,
            parts=ask.parts,
            margin_mm=ask.margin_mm,
            coarse_spacing_mm=ask.coarse_spacing_mm,
            min_organ_ml=ask.min_organ_ml,
        )
        digest = store.publish_bundle(draft)
    except BundleError as error:
        if error.code != "wrong_model_kind":
            raise
        raise ServiceError(422, error.code, error.detail) from error
    except ValueError as error:
        raise ServiceError(
            422, "invalid_request", "the parts of the cascade do not go together"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    manifest = bundle.load(store.bundle_dir(digest), verify=False)
    return registry.register(
        session,
        name,
        kind=manifest.kind,
        digest=digest,
        manifest=manifest.model_dump(mode="json"),
    )
