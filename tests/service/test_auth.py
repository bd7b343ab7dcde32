"""Tokens are opaque, hashed, revocable; patients' ids become pseudonyms."""

import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from service import auth, db
from service.auth import Role
from service.db import Token
from service.errors import ServiceError
from service.settings import Settings


@pytest.fixture
def session(sessions):
    with sessions() as session:
        yield session


def test_a_token_names_its_owner_and_only_its_digest_is_kept(session):
    row, token = auth.create_token(session, "anna's laptop", Role.ANNOTATOR)
    session.commit()

    assert token.startswith("pcrl_")
    assert auth.authenticate(session, token) == auth.Principal(
        row.id, "anna's laptop", Role.ANNOTATOR, "prj_default"
    )
    assert len(row.digest) == 32
    assert token.rsplit("_", 1)[1].encode() not in row.digest


def test_wrong_expired_and_revoked_tokens_are_refused_alike(session):
    _, good = auth.create_token(session, "a", Role.ADMIN)
    past = datetime.now(UTC) - timedelta(seconds=1)
    _, expired = auth.create_token(session, "b", Role.ADMIN, past)
    revoked_row, revoked = auth.create_token(session, "c", Role.ADMIN)
    auth.revoke_token(session, revoked_row.id)
    session.commit()
    assert auth.authenticate(session, good).role is Role.ADMIN

    messages = set()
    for token in (None, "", "pcrl_x", good[:-1] + "!", good + "a", expired, revoked):
        with pytest.raises(ServiceError) as refused:
            auth.authenticate(session, token)
        assert (refused.value.status, refused.value.code) == (401, "not_authenticated")
        assert refused.value.headers == {"WWW-Authenticate": "Bearer"}
        messages.add(refused.value.detail)

    assert len(messages) == 1
    with pytest.raises(ServiceError):
        auth.revoke_token(session, revoked_row.id)


def test_a_token_acts_in_its_project_and_an_admins_of_all_in_any(session):
    session.add(db.Project(id="prj_liver", name="liver"))
    session.flush()
    _, of_one = auth.create_token(session, "a", Role.ADMIN, project_id="prj_liver")
    _, of_all = auth.create_token(session, "b", Role.ADMIN)
    session.commit()

    def acts_in(token, project=None):
        try:
            found = auth.authenticate(session, token, project)
        except ServiceError as error:
            return error.status, error.detail
        return found.project_id, found.all_projects

    assert acts_in(of_one) == acts_in(of_one, "liver") == ("prj_liver", False)
    assert acts_in(of_all) == acts_in(of_all, "default") == ("prj_default", True)
    assert acts_in(of_all, "liver") == acts_in(of_all, "prj_liver") == ("prj_liver", True)
    elsewhere = acts_in(of_one, "default")  # another's project is none
    assert elsewhere[0] == 404
    assert elsewhere == acts_in(of_one, "absent") == acts_in(of_all, "a\0b") == acts_in(of_all, "")


def test_a_token_that_the_version_before_made_is_of_the_default_project(session):
    row, token = auth.create_token(session, "a", Role.RESEARCHER)
    row.project_id = None
    session.commit()

    found = auth.authenticate(session, token)

    assert (found.project_id, found.all_projects) == ("prj_default", False)


def test_a_role_may_what_the_lower_ones_may():
    roles = list(Role)

    for high, role in enumerate(roles):
        assert [role.covers(other) for other in roles] == [low <= high for low in range(4)]


def test_the_first_admin_token_is_made_once(session, tmp_path):
    settings = Settings(data_dir=tmp_path)

    token = auth.ensure_admin_token(session, settings)

    assert auth.authenticate(session, token).role is Role.ADMIN
    assert auth.ensure_admin_token(session, settings) is None
    assert len(session.scalars(select(Token)).all()) == 1


def test_the_first_admin_token_may_come_from_a_file(session, tmp_path):
    path = tmp_path / "token"
    token = f"pcrl_{'0a' * 6}_{'s' * 40}"
    path.write_text(token + "\n")

    assert auth.ensure_admin_token(session, Settings(admin_token_file=path)) is None

    assert auth.authenticate(session, token).role is Role.ADMIN


def test_a_file_that_holds_no_token_is_refused(session, tmp_path):
    path = tmp_path / "token"
    path.write_text("hunter2")

    with pytest.raises(ValueError, match="must hold pcrl_") as refused:
        auth.ensure_admin_token(session, Settings(admin_token_file=path))

    assert "hunter2" not in str(refused.value)


def test_a_pseudonym_is_stable_at_a_site_and_differs_between_sites(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"

    name = auth.subject_pseudonym(here, "PAT-4711")

    assert name == auth.subject_pseudonym(here, "PAT-4711")
    assert name != auth.subject_pseudonym(here, "PAT-4712")
    assert name != auth.subject_pseudonym(there, "PAT-4711")
    assert len(name) == 20
    key = here / "secrets" / "pseudonym.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    assert list(key.parent.iterdir()) == [key]


def test_processes_that_start_together_share_one_key(tmp_path):
    start = threading.Barrier(8)

    def name(_):
        start.wait()
        return auth.subject_pseudonym(tmp_path, "PAT-1")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(name, range(8)))) == 1
