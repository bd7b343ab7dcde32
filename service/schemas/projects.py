"""Projects: who shares scans, runs and models, and how much they may take up."""

from __future__ import annotations

from typing import Annotated

from pydantic import AwareDatetime, ConfigDict, Field
from pydantic.config import JsonDict

from service.schemas.base import HEX, TIME, Answer, Ask, Page, page_of

ProjectId = Annotated[str, Field(pattern=r"^prj_(default|[0-9a-f]{32})$", examples=[f"prj_{HEX}"])]
ProjectName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        examples=["liver-study"],
        description="Not beginning with `prj_`; it may stand in the header `PCRL-Project`.",
    ),
]
_Count = Annotated[int, Field(ge=0, lt=2**31, examples=[100])]
_Bytes = Annotated[int, Field(ge=0, lt=2**63, examples=[10**12])]
_EXAMPLE: JsonDict = {
    "id": f"prj_{HEX}",
    "name": "liver-study",
    "max_queued": 100,
    "max_running": 2,
    "max_stored_bytes": None,
    "created_at": TIME,
}


class _Limits(Ask):
    """What a project may take up; 0 is no limit, null the site's."""

    max_queued: _Count | None = Field(None, description="Runs that wait; more get 429.")
    max_running: _Count | None = Field(
        None, description="Runs that are worked on at once in a queue; more wait."
    )
    max_stored_bytes: _Bytes | None = Field(
        None, description="Bytes of its scans; uploads beyond get 429."
    )


class ProjectCreate(_Limits):
    """A new project."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"examples": [{"name": "liver-study", "max_running": 2}]},
    )

    name: ProjectName


class ProjectChange(_Limits):
    """What changes in a project; a field that is left out stays (RFC 7396)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"max_running": None}]}
    )

    name: ProjectName | None = Field(None, description="Null leaves it as it is.")


class Project(Answer):
    """A project; a limit that is null is the site's, 0 is none."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_EXAMPLE]})

    id: ProjectId
    name: str
    max_queued: int | None
    max_running: int | None
    max_stored_bytes: int | None
    created_at: AwareDatetime


class ProjectPage(Page[Project]):
    """Projects by name."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(Project))
