"""The compose file keeps what SECURITY.md promises (reliability.md, S10 and S12).

Each rule is a function that lists what breaks it; each has a mutated file as negative control.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from service.cli import app
from service.settings import Settings

DATASTORES = ("db", "redis")
ONE_SHOT = ("migrate",)
SECRET_WORDS = re.compile(r"password|secret|token|api_?key|credential", re.IGNORECASE)
Rule = Callable[[Any], Iterator[str]]


def runs_as_root(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        user = str(service.get("user", "")).split(":")[0]
        if not user.isdigit() or int(user) == 0:
            yield f"{name}: user {user!r}"


def is_writable(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        if service.get("read_only") is not True:
            yield f"{name}: the root file system is writable"
        if not any(mount.split(":")[0] == "/tmp" for mount in service.get("tmpfs", [])):
            yield f"{name}: no /tmp"


def keeps_capabilities(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
            yield f"{name}: capabilities"
        if service.get("privileged") or service.get("devices") or service.get("pid"):
            yield f"{name}: host access"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name}: may gain privileges"


def reaches_the_engine(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            if not isinstance(volume, str) or volume.startswith(("/", ".", "~")):
                yield f"{name}: mounts {volume} of the host"
        if service.get("network_mode"):
            yield f"{name}: network_mode"


def is_unwatched(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        check = service.get("healthcheck", {})
        if name not in ONE_SHOT and (not check.get("test") or check.get("disable")):
            yield f"{name}: no healthcheck"


def is_unlimited(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        if not service.get("mem_limit") or not 0 < service.get("pids_limit", 0) <= 1024:
            yield f"{name}: no limit on memory or processes"
        if service.get("restart") != ("no" if name in ONE_SHOT else "unless-stopped"):
            yield f"{name}: restart {service.get('restart')!r}"


def shows_a_secret(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        if service.get("env_file"):
            yield f"{name}: env_file"
        for variable, value in service.get("environment", {}).items():
            if variable.endswith("_FILE"):
                if not str(value).startswith("/run/secrets/"):
                    yield f"{name}: {variable} is no secret file"
                elif str(value).removeprefix("/run/secrets/") not in service.get("secrets", []):
                    yield f"{name}: {variable} is not mounted"
            elif SECRET_WORDS.search(variable) or re.search(r"//[^/@]*:[^/@]*@", str(value)):
                yield f"{name}: {variable} holds a secret"
        for word in service.get("command", []):
            is_file = word.startswith("/run/secrets/")
            if (SECRET_WORDS.search(word) and not is_file) or word in (
                "--requirepass",
                "--masterauth",
            ):
                yield f"{name}: a secret on the command line"
    for name, secret in compose["secrets"].items():
        if set(secret) != {"file"}:
            yield f"secret {name}: not a file"


def exposes_a_datastore(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        if service.get("ports") and name != "proxy":
            yield f"{name}: publishes a port"
        open_networks = [
            network
            for network in service["networks"]
            if not compose["networks"][network].get("internal")
        ]
        if open_networks and name != "proxy":
            yield f"{name}: on {open_networks}, which leave the host"
    for name in DATASTORES:
        if compose["services"][name]["networks"] != ["datastore"]:
            yield f"{name}: on another network than the datastore's"
    if "datastore" in compose["services"]["proxy"]["networks"]:
        yield "proxy: on the datastore's network"


def listens_without_tls(compose: Any) -> Iterator[str]:
    for port in compose["services"]["proxy"]["ports"]:
        if not port.startswith("127.0.0.1:") and not port.endswith(":8443"):
            yield f"proxy: {port} offers plain HTTP to other machines"


def keeps_nothing(compose: Any) -> Iterator[str]:
    command = " ".join(compose["services"]["redis"]["command"])
    for option in ("--appendonly yes", "--maxmemory-policy noeviction", "--aclfile "):
        if option not in command:
            yield f"redis: without {option}"
    for name in DATASTORES:
        if not compose["services"][name].get("volumes"):
            yield f"{name}: no volume"


def floats(compose: Any) -> Iterator[str]:
    for name, service in compose["services"].items():
        if "build" not in service and not re.search(r":\d+\.\d+(\.\d+)?-\w+$", service["image"]):
            yield f"{name}: {service['image']} is no exact version"
    found = re.search(r"^redis:(\d+)\.(\d+)\.(\d+)", compose["services"]["redis"]["image"])
    major, minor, patch = map(int, found.groups()) if found else (0, 0, 0)
    floors = {(7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}  # CVE-2025-49844
    if patch < floors.get((major, minor), 0 if (major, minor) > (8, 2) else 1000):
        yield f"redis: {major}.{minor}.{patch} is below the floor"
    if not compose["services"]["db"]["image"].startswith("postgres:17."):
        yield "db: another major version than the volume was made with"


def cuts_off_work(compose: Any) -> Iterator[str]:
    for name in ("worker-inference", "worker-train"):
        service = compose["services"][name]
        grace_s = int(str(service.get("stop_grace_period", "10s")).removesuffix("s"))
        own_s = float(
            service["environment"].get(
                "PCRL_STOP_GRACE_S", Settings.model_fields["stop_grace_s"].default
            )
        )
        if grace_s < 120 or own_s >= grace_s:
            yield f"{name}: {grace_s} s to stop, {own_s} s for the checkpoint"


def sets_what_is_no_setting(compose: Any) -> Iterator[str]:
    known = {f"PCRL_{name.upper()}" for name in Settings.model_fields}
    for name, service in compose["services"].items():
        for variable in service.get("environment", {}):
            if variable.startswith("PCRL_") and variable not in known:
                yield f"{name}: {variable}"


def runs_what_does_not_exist(compose: Any) -> Iterator[str]:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, service in compose["services"].items():
        command = service.get("command", [])
        if "build" not in service:
            continue
        if command[0] != "pcrl" or command[1] not in commands:
            yield f"{name}: {command}"
        elif any(
            word.startswith("--") and word not in _options(commands[command[1]]) for word in command
        ):
            yield f"{name}: {command} has an unknown option"


def _options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


RULES: dict[Rule, Callable[[Any], Any]] = {
    runs_as_root: lambda s: s["api"].update(user="0:0"),
    is_writable: lambda s: s["worker-train"].pop("read_only"),
    keeps_capabilities: lambda s: s["proxy"].update(cap_add=["NET_ADMIN"]),
    reaches_the_engine: lambda s: s["upkeep"]["volumes"].append(
        "/var/run/docker.sock:/var/run/docker.sock"
    ),
    is_unwatched: lambda s: s["redis"].pop("healthcheck"),
    is_unlimited: lambda s: s["api"].pop("mem_limit"),
    shows_a_secret: lambda s: s["db"]["environment"].update(POSTGRES_PASSWORD="hunter2"),
    exposes_a_datastore: lambda s: s["db"].update(ports=["5432:5432"]),
    listens_without_tls: lambda s: s["proxy"].update(ports=["8080:8080"]),
    keeps_nothing: lambda s: s["redis"].update(command=["redis-server"]),
    floats: lambda s: s["redis"].update(image="redis:7.4.5-bookworm"),
    cuts_off_work: lambda s: s["worker-train"].update(stop_grace_period="60s"),
    sets_what_is_no_setting: lambda s: s["api"]["environment"].update(PCRL_DATABASE="x"),
    runs_what_does_not_exist: lambda s: s["upkeep"].update(command=["pcrl", "beat"]),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_service_breaks_the_rule(compose: Any, rule: Rule) -> None:
    assert list(rule(compose)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_sees_a_service_that_breaks_it(
    compose_with: Callable[..., Any], rule: Rule
) -> None:
    broken = compose_with()

    RULES[rule](broken["services"])

    assert list(rule(broken))


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        (shows_a_secret, lambda c: c["services"]["api"]["environment"].update(
            PCRL_BROKER_URL="redis://pcrl:hunter2@redis:6379/0")),
        (shows_a_secret, lambda c: c["services"]["upkeep"].update(secrets=["broker_url"])),
        (shows_a_secret, lambda c: c["secrets"].update(x={"environment": "X"})),
        (exposes_a_datastore, lambda c: c["networks"].update(datastore={})),
        (exposes_a_datastore, lambda c: c["services"]["proxy"]["networks"].append("datastore")),
        (floats, lambda c: c["services"]["proxy"].update(image="nginx:latest")),
        (floats, lambda c: c["services"]["db"].update(image="postgres:18.1-bookworm")),
        (keeps_capabilities, lambda c: c["services"]["db"].update(security_opt=[])),
        (runs_what_does_not_exist, lambda c: c["services"]["worker-train"].update(
            command=["pcrl", "worker", "--line", "train"])),
    ],
)  # fmt: skip
def test_the_rule_sees_the_other_ways_to_break_it(
    compose_with: Callable[..., Any], rule: Rule, break_it: Callable[[Any], Any]
) -> None:
    broken = compose_with()

    break_it(broken)

    assert list(rule(broken))


def test_what_the_dockerfiles_copy_exists_and_reaches_the_build(root: Path) -> None:
    allowed = [
        line.removeprefix("!")
        for line in (root / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]

    for dockerfile in (root / "docker").glob("*.Dockerfile"):
        copied = re.findall(r"^COPY (?!--from)(.+)$", dockerfile.read_text(), re.MULTILINE)
        assert copied
        for source in " ".join(line.rsplit(" ", 1)[0] for line in copied).split():
            assert (root / source).exists(), f"{dockerfile.name} copies {source}"
            assert source in allowed, f".dockerignore hides {source}"


def test_the_build_holds_every_package_of_the_wheel(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())
    for dockerfile in (root / "docker").glob("*.Dockerfile"):
        for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
            assert f"\nCOPY {package} {package}\n" in dockerfile.read_text(), dockerfile.name


def test_images_run_as_nobody_special_and_the_service_image_has_no_torch(root: Path) -> None:
    for dockerfile in (root / "docker").glob("*.Dockerfile"):
        users = re.findall(r"^USER (\S+)", dockerfile.read_text(), re.MULTILINE)
        assert users == ["10001:10001"]
    service = (root / "docker/service.Dockerfile").read_text()
    assert "find_spec('torch') is None" in service
    assert "[train" not in service


def test_files_that_compose_names_exist(root: Path, compose: Any) -> None:
    for config in compose["configs"].values():
        assert (root / config["file"]).is_file()
    for service in compose["services"].values():
        if "build" in service:
            assert (root / service["build"]["dockerfile"]).is_file()
