"""No known hole is installed: the floor gate of reliability.md 6.1, offline (S13).

`pip-audit` finds nothing where the network has no advisories, and says so with status 0; this list
is short, dated by its sources, and fails.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    "torch": "2.10",  # CVE-2026-24747: weights_only reader, heap corruption
    "onnx": "1.21",  # CVE-2026-27489, -28500, -34445: external data
    "pydicom": "3.0.2",  # CVE-2026-32711: DICOMDIR traversal
    "starlette": "1.3.1",  # CVE-2026-54283
    "kombu": "5.7.0",  # celery#10205, #10502: workers stop consuming without a word
}
FLOORS_IF_INSTALLED = {
    "python-multipart": "0.0.31",  # GHSA-v9pg-7xvm-68hf
    "pyjwt": "2.13.0",  # CVE-2026-32597, -48526
    "authlib": "1.6.9",  # CVE-2026-27962
    "pillow": "12.2.0",
}
VersionOf = Callable[[str], str | None]


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def below_floor(version_of: VersionOf) -> Iterator[str]:
    for name, floor in {**FLOORS, **FLOORS_IF_INSTALLED}.items():
        found = version_of(name)
        if found is None:
            if name in FLOORS:
                yield f"{name} is not installed; {floor} or newer is needed"
        elif Version(found) < Version(floor):
            yield f"{name} {found} is below {floor}"


def pins(text: str) -> dict[str, Version]:
    """Name and version of each line of a constraints file."""
    found: dict[str, Version] = {}
    for line in text.splitlines():
        stated = line.split("#")[0].strip()
        if stated:
            name, _, pinned = stated.partition("==")
            found[canonicalize_name(name)] = Version(pinned)
    return found


def ranges(project: Any) -> list[Requirement]:
    """Every requirement of pyproject.toml, of every extra."""
    extras = project["project"].get("optional-dependencies", {}).values()
    stated = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in stated]


@pytest.fixture
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def constraints() -> str:
    return (ROOT / "constraints.txt").read_text()


def test_what_is_installed_is_above_every_floor() -> None:
    assert list(below_floor(installed)) == []


@pytest.mark.parametrize("name", [*FLOORS, *FLOORS_IF_INSTALLED])
def test_the_gate_sees_an_old_version(name: str) -> None:
    found = list(below_floor(lambda asked: "0.0.1" if asked == name else "99"))

    assert len(found) == 1
    assert found[0].startswith(name)


def test_the_gate_sees_a_needed_package_that_is_missing() -> None:
    found = list(below_floor(lambda _: None))

    assert len(found) == len(FLOORS)


def test_no_range_of_the_project_allows_a_version_below_its_floor(project: Any) -> None:
    for requirement in ranges(project):
        floor = FLOORS.get(canonicalize_name(requirement.name))
        if floor is not None:
            below = [f"{floor}.dev0", "1.0", "0.1"]
            assert not any(requirement.specifier.contains(v, prereleases=True) for v in below), (
                f"{requirement} allows less than {floor}"
            )


def test_every_pin_is_exact_and_named_once(constraints: str) -> None:
    lines = [line.split("#")[0].strip() for line in constraints.splitlines()]
    stated = [line for line in lines if line]

    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line) for line in stated)
    assert len(pins(constraints)) == len(stated)


def test_every_pin_lies_in_the_range_of_the_project(project: Any, constraints: str) -> None:
    pinned = pins(constraints)
    outside = [
        f"{requirement}: {pinned[canonicalize_name(requirement.name)]}"
        for requirement in ranges(project)
        if canonicalize_name(requirement.name) in pinned
        and pinned[canonicalize_name(requirement.name)] not in requirement.specifier
    ]

    assert outside == []


def test_every_requirement_is_pinned_but_the_gpu_distribution(
    project: Any, constraints: str
) -> None:
    named = {canonicalize_name(requirement.name) for requirement in ranges(project)}

    assert named - set(pins(constraints)) <= {"onnxruntime-gpu"}


def test_every_pin_is_above_every_floor(constraints: str) -> None:
    pinned = pins(constraints)

    def version_of(name: str) -> str | None:
        return str(pinned[canonicalize_name(name)]) if canonicalize_name(name) in pinned else None

    assert list(below_floor(version_of)) == []


def test_only_one_onnxruntime_is_installed() -> None:
    # The two distributions share a folder; the last one hides the other (onnxruntime#26996).
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed(name)]

    assert len(found) == 1
