"""Products of a volume's axes with banded matrices on a CPU, computed where the band is.

An anti-aliased resize reads a few voxels around each one that it makes: of a row of 112 numbers six
differ from 0. So rows are taken in blocks, and of the matrix's columns only a window for each
block. The windows begin at equal distances and overlap, so that all blocks are one batch of
products whose operands are views of the volume, not copies.

m n rows and columns of the matrix, b blocks, l rows of a block, w columns of a window, r lines of
the volume along the axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16
"""Of a block, where that many divide the matrix's; 8 to 16 measured alike, 32 slower."""


@dataclass(frozen=True, slots=True)
class Banded:
    """A matrix cut into blocks of rows; exact for any matrix, faster where it is banded.

    Attributes:
        blocks: What each block multiplies, (b, l, w).
        step: Columns between the beginnings of two windows.
    """

    blocks: Tensor
    step: int

    @classmethod
    def of(cls, matrix: Tensor) -> Banded:
        """Cut (m, n) into blocks, with the least window that takes in all that is not 0."""
        m, n = matrix.shape
        rows = ROWS if m % ROWS == 0 else m
        num_blocks = m // rows
        touched = (matrix != 0).reshape(num_blocks, rows, n).any(dim=1)
        first = touched.int().argmax(dim=1).tolist()
        end = (n - touched.flip(1).int().argmax(dim=1)).tolist()
        for width in range(1, n + 1):
            step, left_over = divmod(n - width, max(num_blocks - 1, 1))
            starts = [block * step for block in range(num_blocks)]
            if (not left_over or num_blocks == 1) and all(
                start <= low and high <= start + width
                for start, low, high in zip(starts, first, end, strict=True)
            ):
                break
        parts = [
            matrix[block * rows : (block + 1) * rows, start : start + width]
            for block, start in enumerate(starts)
        ]
        return cls(torch.stack(parts), step)

    @classmethod
    def of_filter(cls, matrix: Tensor, radius: int) -> Banded:
        """Cut (n, n), all 0 farther than `radius` from its diagonal, in two."""
        n = len(matrix)
        rows, width = n // 2, n // 2 + radius
        if n % 2 or width >= n:
            return cls(matrix[None], 0)
        return cls(torch.stack([matrix[:rows, :width], matrix[rows:, n - width :]]), n - width)

    @property
    def num_rows(self) -> int:
        """Of the whole matrix."""
        return self.blocks.shape[0] * self.blocks.shape[1]

    def along_last(self, lines: Tensor) -> Tensor:
        """The product with each line; (r, n) to (m, r)."""
        num_blocks, rows, width = self.blocks.shape
        num_lines, n = lines.shape
        lines = lines.contiguous()
        windows = lines.as_strided(
            (num_blocks, width, num_lines), (self.step, 1, n), lines.storage_offset()
        )
        return torch.bmm(self.blocks, windows).reshape(num_blocks * rows, num_lines)


def along_axes(x: Tensor, axes: tuple[Banded, Banded, Banded]) -> Tensor:
    """One matrix an axis of (I, J, K), which lies K fastest; (I', J', K')."""
    along_i, along_j, along_k = axes
    i, j, k = x.shape
    lines = along_k.along_last(x.reshape(-1, k))  # (K', I * J)
    lines = along_j.along_last(lines.reshape(-1, j))  # (J', K' * I)
    lines = along_i.along_last(lines.reshape(-1, i))  # (I', J' * K')
    return lines.reshape(len(lines), along_j.num_rows, -1)
