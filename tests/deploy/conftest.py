"""The compose file and its variants, read and merged without an engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE = "docker-compose.yml"
OVERRIDES = ("docker/compose.cpu.yml", "docker/compose.tls.yml")

MERGED_BY = {"configs": "target"}
"""Lists of a service that Compose merges by this key of their items; other lists are appended."""


class Reset:
    """`!reset`: the value of the base file is removed."""


class Override:
    """`!override`: the value of the base file is replaced."""

    def __init__(self, value: Any) -> None:
        self.value = value


class ComposeLoader(yaml.SafeLoader):
    """YAML 1.1 with merge keys, and the two tags of the Compose specification's merge rules."""


def _reset(_loader: ComposeLoader, _node: yaml.Node) -> Reset:
    return Reset()


def _override(loader: ComposeLoader, node: yaml.Node) -> Override:
    if isinstance(node, yaml.SequenceNode):
        return Override(loader.construct_sequence(node, deep=True))
    if isinstance(node, yaml.MappingNode):
        return Override(loader.construct_mapping(node, deep=True))
    return Override(node.value)


yaml.add_constructor("!reset", _reset, ComposeLoader)
yaml.add_constructor("!override", _override, ComposeLoader)


def read(name: str) -> Any:
    """One compose file, tags kept as `Reset` and `Override`."""
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), ComposeLoader)


def merge(base: Any, over: Any, key: str = "") -> Any:
    """What `docker compose -f base -f over` sees, by the specification's merge rules."""
    if isinstance(over, Override):
        return over.value
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for name, value in over.items():
            if isinstance(value, Reset):
                merged.pop(name, None)
            else:
                merged[name] = merge(base.get(name), value, name)
        return merged
    if isinstance(base, list) and isinstance(over, list) and key not in ("command", "test"):
        by = MERGED_BY.get(key)
        names = {item[by] for item in over if by and isinstance(item, dict)}
        kept = [item for item in base if not (by and isinstance(item, dict) and item[by] in names)]
        return kept + [item for item in over if item not in kept]
    return merge({}, over) if isinstance(over, dict) else over


@pytest.fixture(params=["base", *OVERRIDES])
def compose(request: pytest.FixtureRequest) -> Any:
    """The compose file as it stands, and with each of its variants: the test runs on all."""
    base = read(BASE)
    return base if request.param == "base" else merge(base, read(request.param))


@pytest.fixture
def compose_with() -> Callable[..., Any]:
    """The compose file merged with the named variants."""

    def load(*overrides: str) -> Any:
        merged = read(BASE)
        for name in overrides:
            merged = merge(merged, read(name))
        return copy.deepcopy(merged)

    return load


@pytest.fixture
def root() -> Path:
    """The repository's root."""
    return ROOT
