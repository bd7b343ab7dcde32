"""The registry: names with versions, and aliases that move (MLflow's words).

Names are of one project; which one, the session knows (`service.db.scope`).

A version is a bundle in the store and never changes; an alias (`champion`) points at one version,
carries a revision for optimistic locking, and every move of it is kept in `alias_event`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from models import refs
from service.db import (
    AliasEvent,
    Model,
    ModelAlias,
    ModelVersion,
    db_now,
    insert_if_absent,
)
from service.errors import ServiceError


def register(
    session: Session,
    name: str,
    *,
    kind: str,
    digest: str,
    manifest: dict[str, Any],
    run_id: str | None = None,
) -> ModelVersion:
    """Add a bundle as the next version of a model; the caller commits.

    A run registers once: asked again for the same run, it returns the version that is there.

    Raises:
        ServiceError: 422 `wrong_model_kind` if the name belongs to models of another kind,
            422 `invalid_request` for a name that is none.
    """
    check_name(session, name, kind)
    insert_if_absent(session, Model, name=name, kind=kind)
    session.execute(select(Model.name).where(Model.name == name).with_for_update())
    if run_id is not None:
        there = session.scalars(
            select(ModelVersion).where(ModelVersion.run_id == run_id)
        ).one_or_none()
        if there is not None:
            return there
    newest = session.scalar(
        select(func.max(ModelVersion.version)).where(ModelVersion.model_name == name)
    )
    version = ModelVersion(
        model_name=name,
        version=(newest or 0) + 1,
        digest=digest,
        manifest=manifest,
        run_id=run_id,
    )
    session.add(version)
    session.flush()
    return version


def check_name(session: Session, name: str, kind: str) -> None:
    """Refuse a name that is none, or that belongs to models of another kind (before a run).

    Raises:
        ServiceError: 422 `wrong_model_kind`, 422 `invalid_request`.
    """
    try:
        refs.check_name(name)
    except ValueError as error:
        raise ServiceError(422, "invalid_request", str(error)) from None
    model = _find(session, name)
    if model is not None and model.kind != kind:
        raise ServiceError(
            422,
            "wrong_model_kind",
            f"this name belongs to a model of kind {model.kind}, not {kind}",
        )


def reads_2d(version: ModelVersion) -> bool:
    """Whether a model reads 2D images; else volumes."""
    return len(version.manifest["patch_size"]) == 2


def resolve(session: Session, ref: str) -> ModelVersion:
    """The version that a reference means now; a name alone means its newest version.

    Args:
        session: Database session.
        ref: `liver@champion`, `liver/3`, `liver`, each also with `models:/` before it.

    Raises:
        ServiceError: 404 `not_found`; 422 `invalid_request` if it is no reference.
    """
    try:
        parsed = refs.parse(ref)
    except ValueError:
        raise ServiceError(
            422, "invalid_request", "a model reference is NAME, NAME/VERSION or NAME@ALIAS"
        ) from None
    if parsed.alias is not None:
        found = get_alias(session, parsed.name, parsed.alias).version
        return get_version(session, parsed.name, found)
    if parsed.version is not None:
        return get_version(session, parsed.name, parsed.version)
    newest = session.scalars(
        select(ModelVersion)
        .where(ModelVersion.model_name == parsed.name)
        .order_by(ModelVersion.version.desc())
        .limit(1)
    ).one_or_none()
    if newest is None:
        raise ServiceError(404, "not_found", "no model has this name")
    return newest


def of_run(session: Session, run_id: str) -> ModelVersion | None:
    """The version that a run registered, if it did."""
    return session.scalars(select(ModelVersion).where(ModelVersion.run_id == run_id)).one_or_none()


def listing(session: Session, *, size: int = 50, after: str | None = None) -> Sequence[Model]:
    """Up to `size` models by name, those after the name `after`."""
    statement = select(Model).order_by(Model.name).limit(size)
    if after is not None:
        statement = statement.where(Model.name > after)
    return session.scalars(statement).all()


def get(session: Session, name: str) -> Model:
    """A model by name.

    Raises:
        ServiceError: 404 `not_found`.
    """
    model = _find(session, name)
    if model is None:
        raise ServiceError(404, "not_found", "no model has this name")
    return model


def versions(session: Session, name: str) -> Sequence[ModelVersion]:
    """All versions of a model, newest first."""
    return session.scalars(
        select(ModelVersion)
        .where(ModelVersion.model_name == name)
        .order_by(ModelVersion.version.desc())
    ).all()


def get_version(session: Session, name: str, version: int) -> ModelVersion:
    """One version.

    Raises:
        ServiceError: 404 `not_found`.
    """
    found = session.scalars(
        select(ModelVersion).where(ModelVersion.model_name == name, ModelVersion.version == version)
    ).one_or_none()
    if found is None:
        raise ServiceError(404, "not_found", "the model has no such version")
    return found


def aliases(session: Session, name: str) -> Sequence[ModelAlias]:
    """All aliases of a model, by name."""
    return session.scalars(
        select(ModelAlias).where(ModelAlias.model_name == name).order_by(ModelAlias.alias)
    ).all()


def get_alias(session: Session, name: str, alias: str) -> ModelAlias:
    """One alias.

    Raises:
        ServiceError: 404 `not_found`.
    """
    found = _alias(session, name, alias)
    if found is None:
        raise ServiceError(404, "not_found", "the model has no such alias")
    return found


def alias_history(session: Session, name: str, alias: str) -> Sequence[AliasEvent]:
    """Every move of an alias, oldest first."""
    return session.scalars(
        select(AliasEvent)
        .where(AliasEvent.model_name == name, AliasEvent.alias == alias)
        .order_by(AliasEvent.seq)
    ).all()


def set_alias(
    session: Session,
    name: str,
    alias: str,
    version: int,
    *,
    principal: str,
    if_match: int | None = None,
) -> ModelAlias:
    """Point an alias at a version; the caller commits.

    Args:
        session: Database session.
        name: The model.
        alias: What `models.refs.check_alias` lets through.
        version: An existing version.
        principal: Id of who does it.
        if_match: The revision the caller saw; None overwrites whatever is there.

    Raises:
        ServiceError: 404 `not_found`, 412 `precondition_failed`, 422 `invalid_request`.
    """
    try:
        refs.check_alias(alias)
    except ValueError as error:
        raise ServiceError(422, "invalid_request", str(error)) from None
    get_version(session, name, version)
    if if_match is None:
        insert_if_absent(
            session, ModelAlias, model_name=name, alias=alias, version=version, revision=0
        )
    statement = update(ModelAlias).where(ModelAlias.model_name == name, ModelAlias.alias == alias)
    if if_match is not None:
        statement = statement.where(ModelAlias.revision == if_match)
    moved = session.scalars(
        statement.values(
            version=version, revision=ModelAlias.revision + 1, updated_at=db_now()
        ).returning(ModelAlias),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if moved is None:
        raise changed(session, name, alias, if_match)
    session.add(AliasEvent(model_name=name, alias=alias, version=version, set_by=principal))
    session.flush()
    return moved


def delete_alias(
    session: Session, name: str, alias: str, *, principal: str, if_match: int | None = None
) -> None:
    """Remove an alias; the caller commits.

    Raises:
        ServiceError: 404 `not_found`, 412 `precondition_failed`.
    """
    get_alias(session, name, alias)
    statement = delete(ModelAlias).where(ModelAlias.model_name == name, ModelAlias.alias == alias)
    if if_match is not None:
        statement = statement.where(ModelAlias.revision == if_match)
    if session.scalars(statement.returning(ModelAlias.alias)).one_or_none() is None:
        raise changed(session, name, alias, if_match)
    session.add(
        AliasEvent(model_name=name, alias=alias, version=None, set_by=principal, cause="remove")
    )
    session.flush()


def changed(session: Session, name: str, alias: str, expected: int | None) -> ServiceError:
    """The refusal (412) of who saw another revision of an alias than there is."""
    there = _alias(session, name, alias, populate_existing=True)
    found = f"its revision is {there.revision}" if there is not None else "it does not exist"
    return ServiceError(412, "precondition_failed", f"revision {expected} was expected; {found}")


def _find(session: Session, name: str) -> Model | None:
    return session.scalars(select(Model).where(Model.name == name)).one_or_none()


def _alias(
    session: Session, name: str, alias: str, *, populate_existing: bool = False
) -> ModelAlias | None:
    named = select(ModelAlias).where(ModelAlias.model_name == name, ModelAlias.alias == alias)
    options = {"populate_existing": populate_existing}
    return session.scalars(named, execution_options=options).one_or_none()
