"""Settings come from PCRL_ variables; without any, everything is embedded."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    import os

    for name in os.environ:
        if name.startswith("PCRL_"):
            monkeypatch.delenv(name)


def test_the_defaults_are_embedded_and_closed_to_the_network(tmp_path):
    settings = Settings(data_dir=tmp_path)

    assert settings.is_embedded
    assert settings.database_url == f"sqlite:///{tmp_path}/pcrl.sqlite3"
    assert settings.host == "127.0.0.1"


def test_every_setting_says_what_it_is():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_variables_set_them(monkeypatch, tmp_path):
    monkeypatch.setenv("PCRL_LEASE_S", "6")
    monkeypatch.setenv("PCRL_HEARTBEAT_S", "2")
    monkeypatch.setenv("PCRL_DATA_DIR", str(tmp_path))

    settings = Settings()

    assert (settings.lease_s, settings.heartbeat_s, settings.data_dir) == (6.0, 2.0, tmp_path)


def test_secrets_come_from_files_and_never_show(monkeypatch, tmp_path):
    for name, content in (
        ("url", "postgresql+psycopg://pcrl@db/pcrl\n"),
        ("password", "s3cret/@:\n"),
        ("broker", "redis://:s3cret@redis:6379/0\n"),
    ):
        (tmp_path / name).write_text(content)
    monkeypatch.setenv("PCRL_DATABASE_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("PCRL_DATABASE_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("PCRL_BROKER_URL_FILE", str(tmp_path / "broker"))

    settings = Settings()

    from sqlalchemy import make_url

    assert make_url(settings.database_url).password == "s3cret/@:"
    assert settings.broker_url == "redis://:s3cret@redis:6379/0"
    assert not settings.is_embedded
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_s": 30.0},
        {"broker_url": "amqp://x"},
        {"database_url": "mysql://x"},
        {"database_url_file": "/nowhere/url"},
        {"database_password_file": "/nowhere/password"},
        {"device": "tpu"},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_importing_them_loads_neither_database_nor_web_nor_queue():
    code = (
        "import sys, service.settings\n"
        "print([m for m in ('sqlalchemy', 'fastapi', 'celery', 'torch') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert found.stdout.strip() == "[]"
