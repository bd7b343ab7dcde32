"""The files of a folder, each consumed or explained.

Names in tables are looked up among the files that were found below the folder, so none leads out
of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from imaging.datasets.plan import Image, LayoutError

NOT_OF_THE_LAYOUT = "not part of this layout"


class Files:
    """Every file below a folder.

    Args:
        folder: Where the data set lies. Links are followed, as users keep large data elsewhere.

    Raises:
        LayoutError: `not_this_layout`: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise LayoutError("not_this_layout", "the data set's folder does not exist")
        self.folder = folder
        self._paths = {path.relative_to(folder).as_posix(): path for path in _below(folder)}
        self._consumed: set[str] = set()
        self._why: dict[str, str] = {
            name: "a hidden file" for name in self._paths if PurePosixPath(name).name[0] == "."
        }

    def matching(self, pattern: str) -> list[tuple[Path, re.Match[str]]]:
        """Files whose path below the folder matches to its end, sorted; hidden ones never do."""
        found = re.compile(rf"(?:.*/)?{pattern}")
        matches = ((name, found.fullmatch(name)) for name in sorted(self._paths))
        return [(self._paths[name], m) for name, m in matches if m and name not in self._why]

    def get(self, name: str, below: Path | None = None) -> Path | None:
        """A file by its path below the folder, or below one of its subfolders; not yet consumed."""
        start = "" if below is None else below.relative_to(self.folder).as_posix()
        return self._paths.get(os.path.normpath(PurePosixPath(start) / name))

    def take(self, path: Path) -> Path:
        """Consume a file; returns it."""
        self._consumed.add(path.relative_to(self.folder).as_posix())
        return path

    def need(self, name: str, below: Path | None = None) -> Path:
        """Consume a file that a table names.

        Raises:
            LayoutError: `file_missing`.
        """
        path = self.get(name, below)
        if path is None:
            raise LayoutError("file_missing", f"a table names {name!r}, which is not there")
        return self.take(path)

    def image(self, path: Path, channel: int | None = None) -> Image:
        """Consume an image; of a `.mhd` header also the voxels, which lie beside it.

        Raises:
            LayoutError: `file_missing`.
        """
        voxels = None
        if path.suffix == ".mhd":
            beside = [path.with_suffix(ending) for ending in (".raw", ".zraw")]
            names = [file.relative_to(self.folder).as_posix() for file in beside]
            there = [self._paths[name] for name in names if name in self._paths]
            if not there:
                raise LayoutError("file_missing", f"{path.name} has neither .raw nor .zraw beside")
            voxels = self.take(there[0])
        return Image(self.take(path), voxels, channel)

    def explain(self, pattern: str, why: str) -> None:
        """Say why the files that match are not used."""
        for path, _ in self.matching(pattern):
            self._why[path.relative_to(self.folder).as_posix()] = why

    @property
    def consumed(self) -> frozenset[Path]:
        """What is used."""
        return frozenset(self._paths[name] for name in self._consumed)

    @property
    def explained(self) -> dict[Path, str]:
        """What is not, and why."""
        return {
            path: self._why.get(name, NOT_OF_THE_LAYOUT)
            for name, path in sorted(self._paths.items())
            if name not in self._consumed
        }


def _below(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root, name) for name in names)
