"""Views cut into a regular grid of cubes, and put together again; nothing is computed.

B batch, N blocks counted with I slowest, S side of a block, I J K voxels.
"""

from __future__ import annotations

from torch import Tensor

Shape = tuple[int, int, int]


def grid_of(shape: Shape, side: int) -> Shape:
    """Blocks along each axis."""
    i, j, k = (n // side for n in shape)
    return i, j, k


def split(views: Tensor, side: int) -> Tensor:
    """(B, 1, I, J, K), extents that are multiples of the side, to (B, N, S, S, S)."""
    batch, _, *shape = views.shape
    i, j, k = (n // side for n in shape)
    cut = views.reshape(batch, i, side, j, side, k, side).permute(0, 1, 3, 5, 2, 4, 6)
    return cut.reshape(batch, i * j * k, side, side, side)


def join(blocks: Tensor, shape: Shape) -> Tensor:
    """What `split` took apart: (B, N, S, S, S) to (B, 1, I, J, K)."""
    side = blocks.shape[-1]
    i, j, k = grid_of(shape, side)
    back = blocks.reshape(-1, i, j, k, side, side, side).permute(0, 1, 4, 2, 5, 3, 6)
    return back.reshape(-1, 1, *shape)
