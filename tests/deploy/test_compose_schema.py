"""The compose files against the Compose specification's own JSON schema.

The schema is the specification's `compose-spec.json`, as the test dependency `check-jsonschema`
ships it; it is read from the installed package, so nothing is fetched and nothing copied here.
A schema cannot run a container: what it does not see is in docs/adr/0005.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib.metadata import files
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest


@pytest.fixture(scope="module")
def validator() -> Any:
    """A validator for compose files."""
    found = [
        file
        for file in files("check-jsonschema") or ()
        if file.as_posix().endswith("vendor/compose-spec.json")
    ]
    assert len(found) == 1, "check-jsonschema ships the schema under another name now"
    schema = json.loads(found[0].read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


def faults(validator: Any, compose: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(compose)]


def test_the_schema_is_the_compose_specifications(validator: Any) -> None:
    assert "Compose" in validator.schema["title"] or "compose" in validator.schema["$id"]
    assert {"services", "networks", "volumes", "secrets"} <= set(validator.schema["properties"])


def test_the_compose_file_and_its_variants_follow_the_specification(
    validator: Any, compose: Any
) -> None:
    assert faults(validator, compose) == []


@pytest.mark.parametrize(
    ("break_it", "path"),
    [
        (lambda c: c["services"]["api"].update(mem_limits="1g"), "api"),
        (lambda c: c["services"]["api"]["healthcheck"].update(test=5), "api"),
        (lambda c: c["services"]["db"].update(read_only=[True]), "db"),
        (lambda c: c["services"]["worker-train"]["deploy"].update(gpus=1), "worker-train"),
        (lambda c: c.update(service={}), ""),
        (lambda c: c["networks"]["datastore"].update(internal=3.5), "datastore"),
        (
            lambda c: c["services"]["upkeep"]["depends_on"].update(db={"condition": "healthy"}),
            "upkeep",
        ),
    ],
)
def test_the_schema_sees_a_mistake(
    validator: Any,
    compose_with: Callable[..., Any],
    break_it: Callable[[Any], None],
    path: str,
) -> None:
    broken = copy.deepcopy(compose_with())

    break_it(broken)

    found = faults(validator, broken)
    assert found
    assert any(path in fault for fault in found)


def test_what_services_name_is_declared(compose: Any) -> None:
    """What the schema cannot say: references between sections resolve."""
    for name, service in compose["services"].items():
        for other in service.get("depends_on", {}):
            assert other in compose["services"], f"{name} waits for {other}"
        assert set(service["networks"]) <= set(compose["networks"]), name
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"], f"{name} wants {secret}"
        for config in service.get("configs", []):
            assert config["source"] in compose["configs"], f"{name} wants {config}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"], f"{name} mounts {volume}"


def test_every_service_waits_for_the_migration_that_succeeded(compose: Any) -> None:
    """Directly or through another service; migrate, db and redis come before it."""
    services = compose["services"]

    def waits(name: str) -> bool:
        conditions = services[name].get("depends_on", {})
        if conditions.get("migrate", {}).get("condition") == "service_completed_successfully":
            return True
        return any(waits(other) for other in conditions)

    assert {name for name in services if not waits(name)} == {"migrate", "db", "redis"}


def test_workers_get_a_gpu_and_the_cpu_variant_asks_for_none(
    compose_with: Callable[..., Any],
) -> None:
    with_gpu = compose_with()["services"]
    without = compose_with("docker/compose.cpu.yml")["services"]

    for name in ("worker-inference", "worker-train"):
        devices = with_gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["capabilities"] == ["gpu"]
        assert with_gpu[name]["environment"]["PCRL_DEVICE"] == "cuda"
        assert with_gpu[name]["build"]["args"]["ORT"] == "gpu"
        assert "devices" not in without[name]["deploy"]["resources"]["reservations"]
        assert without[name]["environment"]["PCRL_DEVICE"] == "cpu"
        assert without[name]["build"]["args"]["ORT"] == "cpu"
        assert "gpu" not in without[name]["image"]


def test_the_tls_variant_publishes_https_alone(compose_with: Callable[..., Any]) -> None:
    proxy = compose_with("docker/compose.tls.yml")["services"]["proxy"]

    assert [port.rsplit(":", 1)[1] for port in proxy["ports"]] == ["8443"]
    assert {config["source"] for config in proxy["configs"]} == {
        "nginx",
        "nginx_locations",
        "nginx_server_tls",
    }
