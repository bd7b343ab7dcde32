"""Projects: who shares scans, runs and models."""

from __future__ import annotations

from service import schemas
from service.client.transport import Transport


class Projects(Transport):
    """Projects of the service; making and changing them is for admins of all."""

    def create_project(self, name: str, **limits: int | None) -> schemas.Project:
        """Make a project; limits are `max_queued`, `max_running` and `max_stored_bytes`."""
        return self._create("projects", {"name": name, **limits}, schemas.Project)

    def projects(self) -> list[schemas.Project]:
        """All projects by name, or the token's."""
        return list(self._pages("projects", schemas.ProjectPage, {}))

    def project(self, project_id: str) -> schemas.Project:
        """A project and its limits."""
        return self._get(f"projects/{project_id}", schemas.Project)

    def change_project(self, project_id: str, **changes: str | int | None) -> schemas.Project:
        """Rename a project (`name`) or change limits; None makes one the site's again."""
        answer = self._again("PATCH", f"projects/{project_id}", json=changes)
        return schemas.Project.model_validate_json(answer.content)
