"""The API process: REST over the database and the store. It computes nothing."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from imaging import sandbox
from service import db, schemas
from service.envelope import Envelope
from service.experiment_reports import Reports
from service.http_metrics import HttpMetrics
from service.metrics import ServiceMetrics
from service.problems import install_handlers, log_unexpected, problem, request_id_of
from service.routers import (
    batches,
    cascades,
    datasets,
    deps,
    embeddings,
    experiments,
    health,
    models,
    projects,
    releases,
    run_files,
    runs,
    segmentations,
    uploads,
    volumes,
)
from service.settings import Settings, get_settings
from service.storage import BlobCorrupt, Store

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Turns unlabelled scans into models: self-supervised pretraining (PCRL), fine-tuning on few "
    "labels, masks and embeddings. Errors are RFC 9457 problems with a stable `code`. "
    "Research use only; not a medical device."
)
ROUTERS = (
    health.open_router,
    health.router,
    projects.router,
    volumes.router,
    uploads.router,
    datasets.router,
    runs.router,
    run_files.router,
    models.router,
    cascades.router,
    releases.router,
    segmentations.router,
    embeddings.router,
    batches.router,
    experiments.router,
)
NAMED: tuple[type[BaseModel], ...] = (schemas.Problem, schemas.Events, schemas.ExperimentEvents)
"""What no route has as its response model, and answers refer to by name."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        settings: Where data and services are; the environment's without it.
    """
    settings = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        """Open the store and the engine; a database that is down is found by the first request."""
        engine = db.connect(settings.database_url)
        app.state.settings = settings
        sandbox.start()
        app.state.store = Store(settings.data_dir, min_free_bytes=settings.min_free_bytes)
        app.state.sessions = db.sessions(engine)
        app.state.of_project = {}  # deps.Sessions
        app.state.reports = Reports()
        app.state.http_metrics = HttpMetrics()
        app.state.metrics = CollectorRegistry()
        app.state.metrics.register(
            ServiceMetrics(app.state.sessions, app.state.store, health.product_version())
        )
        yield
        engine.dispose()

    app = FastAPI(
        title="PCRL",
        version=health.product_version(),
        description=DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        openapi_url=f"{deps.PREFIX}/openapi.json",
        docs_url=None,  # the pages would load scripts from a CDN
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    for router in ROUTERS:
        app.include_router(router)
    install_handlers(app)
    app.add_exception_handler(BlobCorrupt, _blob_corrupt)
    app.add_middleware(Envelope)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _blob_corrupt(request: Request, error: Exception) -> JSONResponse:
    log_unexpected(error, request_id_of(request))
    return problem(request, 500, "blob_corrupt", "a stored file is missing or has changed")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the schemas that hand-written responses refer to."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            license_info=app.license_info,
            routes=app.routes,
        )
        _, extra = models_json_schema(
            [(one, "serialization") for one in NAMED],
            ref_template="#/components/schemas/{model}",
        )
        document["components"]["schemas"].update(extra["$defs"])
        _restore_nulls(document["components"]["schemas"])
        app.openapi_schema = document
    return app.openapi_schema


def _restore_nulls(components: dict[str, Any]) -> None:
    """Put the examples back as they were written: FastAPI drops every null in the document."""
    for name, component in components.items():
        extra = getattr(getattr(schemas, name, None), "model_config", {}).get("json_schema_extra")
        if isinstance(extra, dict):
            component.update(extra)
