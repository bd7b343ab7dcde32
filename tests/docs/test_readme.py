"""The README says what is there: every setting, every file."""

import re
import subprocess
from pathlib import Path

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([^`]+)` \| (.*) \| (.+) \|$", re.MULTILINE)


def settings_rows() -> dict[str, tuple[str, str]]:
    section = README.split("## Settings")[1].split("\n## ")[0]
    return {name: (default, text) for name, default, text in ROW.findall(section)}


def file_map() -> list[str]:
    section = README.split("## Where things are")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.splitlines()


def test_every_setting_stands_in_the_readme_with_its_description() -> None:
    expected = {
        f"PCRL_{name.upper()}": field.description for name, field in Settings.model_fields.items()
    }

    assert {name: text for name, (_, text) in settings_rows().items()} == expected


def test_the_readme_gives_every_settings_default() -> None:
    for name, (default, _) in settings_rows().items():
        field = Settings.model_fields[name.removeprefix("PCRL_").lower()]
        is_unset = field.default is None or str(field.default) == ""
        assert default == ("" if is_unset else f"`{field.default}`"), name


def test_every_python_file_of_the_packages_has_a_line_in_the_file_map() -> None:
    packages = ("imaging/", "models/", "trainer/", "service/")
    files = [name for name in tracked() if name.startswith(packages) and name.endswith(".py")]
    entries = set(file_map())

    missing = [
        name
        for name in files
        if not name.endswith("__init__.py")
        and name not in entries
        and f"{Path(name).parent}/" not in entries
    ]

    assert files, "git lists no files"
    assert not missing


def test_the_file_map_names_nothing_that_is_not_there() -> None:
    missing = [entry for entry in file_map() if not (ROOT / entry).exists()]

    assert file_map()
    assert not missing
