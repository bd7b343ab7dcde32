"""How a model is named: a registered model with a version, an alias, or neither.

    models:/liver@champion   models:/liver/3   liver@champion   liver/3   liver

A bare name, `liver/latest` and `liver@latest` mean the newest version; `liver@v3` means version 3.
Hence `latest` and `v<digits>` are reserved: no alias may be set under those names (MLflow's rule).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SCHEME = "models:/"
LATEST = "latest"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_ALIAS = re.compile(r"[a-z0-9][a-z0-9_-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_RESERVED_ALIAS = re.compile(r"latest|v[0-9]+")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A registered model's name with a version or an alias; with neither, its newest version."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        if self.version is not None:
            return f"{SCHEME}{self.name}/{self.version}"
        if self.alias is not None:
            return f"{SCHEME}{self.name}@{self.alias}"
        return f"{SCHEME}{self.name}"


def parse(text: str) -> ModelRef:
    """Read a model reference.

    Raises:
        ValueError: The text is no reference; the message says which part is wrong.
    """
    rest = text.removeprefix(SCHEME)
    if "@" in rest:
        name, alias = rest.split("@", maxsplit=1)
        return _with_alias(check_name(name), alias)
    name, slash, version = rest.partition("/")
    check_name(name)
    if not slash or version == LATEST:
        return ModelRef(name)
    return ModelRef(name, version=_version(version))


def check_name(name: str) -> str:
    """Return the name if a model may be called so.

    Raises:
        ValueError: It may not.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"model name {name!r} must be 1 to 100 of a-z0-9._- and begin with one of a-z 0-9"
        )
    return name


def check_alias(alias: str) -> str:
    """Return the alias if it may be set.

    Raises:
        ValueError: It is malformed, or reserved (`latest`, `v<digits>`).
    """
    _check_alias_form(alias)
    if _RESERVED_ALIAS.fullmatch(alias):
        raise ValueError(f"alias {alias!r} is reserved: `latest` and v<digits> name versions")
    return alias


def _with_alias(name: str, alias: str) -> ModelRef:
    _check_alias_form(alias)
    if alias == LATEST:
        return ModelRef(name)
    if _RESERVED_ALIAS.fullmatch(alias):
        return ModelRef(name, version=_version(alias.removeprefix("v")))
    return ModelRef(name, alias=alias)


def _check_alias_form(alias: str) -> None:
    if _ALIAS.fullmatch(alias) is None:
        raise ValueError(f"alias {alias!r} must be of a-z 0-9 _ - and begin with a letter or digit")


def _version(text: str) -> int:
    if _VERSION.fullmatch(text) is None:
        raise ValueError(f"version {text!r} must be a whole number from 1, or `latest`")
    return int(text)
