"""Products of a volume's axes with banded matrices on a CPU, computed where the band is.

An anti-aliased resize and a blur read a few voxels around each one that they make: of a row of 112
numbers six differ from 0. Along the first axes of a volume, whose lines lie side by side in memory,
a row of the matrix is a weighted sum of a few lines (`Taps`), for which torch has a kernel: that of
embeddings. Along the last axis the matrix is cut into blocks (`Banded`).

m n rows and columns of the matrix, t taps of a row, b blocks, l rows of a block, w columns of a
window, r lines of the volume along the axis.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

ROWS = (16, 8)
"""Of a block, where they divide the matrix's; measured alike, 32 slower."""


@dataclass(frozen=True, slots=True)
class Taps:
    """A matrix as what each of its rows reads.

    Attributes:
        columns: int64 (m, t); one may stand twice in a row.
        weights: float32 (m, t).
        num_columns: n.
    """

    columns: Tensor
    weights: Tensor
    num_columns: int

    def along(self, x: Tensor, axis: int) -> Tensor:
        """The product along an axis that is not the last of (I, J, K); x is contiguous."""
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        count = before.numel()
        firsts = torch.arange(count) * x.shape[axis]
        columns = (firsts[:, None, None] + self.columns).flatten(0, 1)
        weights = self.weights.repeat(count, 1)
        lines = x.reshape(-1, after.numel())
        summed = F.embedding_bag(columns, lines, mode="sum", per_sample_weights=weights)
        return summed.view(*before, len(self.columns), *after)

    def along_last(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The product along the last axis of (I, J, K).

        Columns must rise in a row and from row to row.

        Args:
            x: Contiguous.
            out: Where to write it, (I, J, m), lines at equal distances; else it is made.
        """
        if out is None:
            out = torch.empty(*x.shape[:-1], len(self.columns))
        lines = x.view(-1, x.shape[-1])
        self._banded().of_lines(lines, out=out.view(-1, out.shape[-1]))
        return out

    def last_to_first(self, x: Tensor) -> Tensor:
        """The same, and the axis becomes the first, (m, I, J)."""
        lines = x.reshape(-1, x.shape[-1])
        return self._banded().of_lines_turned(lines).view(-1, *x.shape[:-1])

    def _banded(self) -> Banded:
        matrix = torch.zeros(len(self.columns), self.num_columns)
        matrix.scatter_add_(1, self.columns, self.weights)
        first, end = self.columns[:, 0].tolist(), (self.columns[:, -1] + 1).tolist()
        return Banded.cut(matrix, first, end)


@dataclass(frozen=True, slots=True)
class Banded:
    """A matrix cut into blocks of rows; exact for any matrix, faster where it is banded.

    Of the matrix's columns a block has a window. The windows begin at equal distances and overlap,
    so that all blocks are one batch of products whose operands are views of the volume, not copies.

    Attributes:
        blocks: What each block multiplies, (b, l, w).
        step: Columns between the beginnings of two windows.
    """

    blocks: Tensor
    step: int

    @classmethod
    def cut(cls, matrix: Tensor, first: Sequence[int], end: Sequence[int]) -> Banded:
        """Cut (m, n), all 0 outside of the columns `first` to `end` of each row."""
        rows, step, width = _windows(matrix.shape[1], tuple(first), tuple(end))
        by_row, by_column = matrix.stride()
        blocks = matrix.as_strided(
            (len(matrix) // rows, rows, width),
            (rows * by_row + step * by_column, by_row, by_column),
            matrix.storage_offset(),
        )
        return cls(blocks, step)

    def of_lines(self, lines: Tensor, *, out: Tensor) -> None:
        """The product with each line, (r, n) to (r, m)."""
        num_blocks, rows, width = self.blocks.shape
        windows = lines.as_strided(
            (num_blocks, len(lines), width),
            (self.step * lines.stride(1), *lines.stride()),
            lines.storage_offset(),
        )
        by_line, by_row = out.stride()
        parts = out.as_strided(
            (num_blocks, len(lines), rows), (rows * by_row, by_line, by_row), out.storage_offset()
        )
        torch.bmm(windows, self.blocks.mT, out=parts)

    def of_lines_turned(self, lines: Tensor) -> Tensor:
        """The product with each line, (r, n) to (m, r)."""
        num_blocks, rows, width = self.blocks.shape
        by_line, by_column = lines.stride()
        windows = lines.as_strided(
            (num_blocks, width, len(lines)),
            (self.step * by_column, by_column, by_line),
            lines.storage_offset(),
        )
        return torch.bmm(self.blocks, windows).view(num_blocks * rows, len(lines))


@functools.lru_cache(maxsize=4096)
def _windows(n: int, first: tuple[int, ...], end: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows of a block, the step between windows and their width."""
    m = len(first)
    rows = next((rows for rows in ROWS if m % rows == 0), m)
    starts = range(0, m, rows)
    lowest = [min(first[row : row + rows]) for row in starts]
    highest = [max(end[row : row + rows]) for row in starts]
    # A window begins no later than its band, and the last one ends within the matrix.
    step = min((low // block for block, low in enumerate(lowest) if block), default=0)
    while True:
        width = max(high - block * step for block, high in enumerate(highest))
        if width + (len(starts) - 1) * step <= n:
            return rows, step, width
        step -= 1
