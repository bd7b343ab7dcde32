"""CSV and JSON as they come with data sets, without trust: bounded, and wrong ones are named."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from imaging.datasets.plan import LayoutError

MAX_TABLE_BYTES = 256 << 20
"""LUNA16's candidates take 75 MB."""

Shape = TypeVar("Shape", bound=BaseModel)


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV file by column, with their numbers.

    Raises:
        LayoutError: `bad_table`: a column is missing, a line is short or long, or it is no text.
    """
    _check_size(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise LayoutError("bad_table", f"{path.name} has no column {missing[0]!r}")
            for number, cells in enumerate(reader, start=2):
                if None in cells or any(cells[name] is None for name in columns):
                    raise LayoutError("bad_table", f"{path.name}, line {number}: cells are missing")
                yield number, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise LayoutError("bad_table", f"{path.name} is not a CSV file in UTF-8") from error


def lines(path: Path) -> list[str]:
    """Lines of a list, without empty ones.

    Raises:
        LayoutError: `bad_table`.
    """
    _check_size(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LayoutError("bad_table", f"{path.name} is not a list in UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def document(path: Path, shape: type[Shape]) -> Shape:
    """A JSON document.

    Raises:
        LayoutError: `bad_table`, naming the first field that is wrong.
    """
    _check_size(path)
    try:
        return shape.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise LayoutError("bad_table", f"{path.name}: {where}: {first['msg']}") from error


def number(text: str, path: Path, line: int) -> float:
    """A finite number of a cell.

    Raises:
        LayoutError: `bad_table`.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise LayoutError("bad_table", f"{path.name}, line {line}: {text[:40]!r} is no number")
    return value


def _check_size(path: Path) -> None:
    if (size := path.stat().st_size) > MAX_TABLE_BYTES:
        raise LayoutError(
            "bad_table", f"{path.name} has {size} bytes; at most {MAX_TABLE_BYTES} are read"
        )
