"""What 3D-CPC puts on the encoder: codes of patches, a context of some, predictions of others.

Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, section 3.1, in the
form of their public code. Rows of patches lie along I. The context of a column (j, k) is a pyramid
on its tip: the patch at the column in the last row seen, and in each row before it the patches one
further away in J and K. A recurrent layer reads them from the base to the tip.

B batch, P columns, L patches of a pyramid, F rows to come, E code, C context, G patches along an
axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchPredictor(nn.Module):
    """Codes, contexts and predictions.

    Args:
        num_inputs: Values of a patch's bottleneck.
        grid: Patches along I, J and K.
        code_size: E.
        context_size: C.
        context_rows: Rows of a pyramid.
        future_rows: F; each has a linear layer of its own.
    """

    reads: Tensor

    def __init__(
        self,
        num_inputs: int,
        grid: tuple[int, int, int],
        *,
        code_size: int,
        context_size: int,
        context_rows: int,
        future_rows: int,
    ) -> None:
        super().__init__()
        self.grid, self.context_rows, self.future_rows = grid, context_rows, future_rows
        self.code = nn.Linear(num_inputs, code_size)
        self.context = nn.GRU(code_size, context_size, batch_first=True)
        self.predict = nn.ModuleList(nn.Linear(context_size, code_size) for _ in range(future_rows))
        self.register_buffer("reads", pyramids(grid, context_rows), persistent=False)

    def forward(self, bottlenecks: Tensor) -> tuple[Tensor, Tensor]:
        """What was predicted of the rows to come, and what they are.

        Args:
            bottlenecks: Of all patches, I slowest, (B * G_I * G_J * G_K, ...).

        Returns:
            Predictions and codes, (F, B * P, E) each.
        """
        codes = self.code(bottlenecks.flatten(1))  # (B * G^3, E)
        size = codes.shape[1]
        by_row = codes.reshape(-1, self.grid[0], self.grid[1] * self.grid[2], size)  # (B, G, P, E)
        seen = by_row.flatten(1, 2)[:, self.reads].flatten(0, 1)  # (B * P, L, E)
        _, last = self.context(seen)
        context = last[0]  # (B * P, C)
        predicted = torch.stack([layer(context) for layer in self.predict])
        end = self.context_rows + self.future_rows
        truth = by_row[:, self.context_rows : end].transpose(0, 1).flatten(1, 2)
        return predicted, truth


def pyramids(grid: tuple[int, int, int], rows: int) -> Tensor:
    """Which patches the context of each column reads, from base to tip, int64 (P, L).

        for each column (j, k), each row i of `rows`, with r = rows - 1 - i:
            for dj in -r ... r: for dk in -r ... r:
                patch (i, j + dj, k + dk), the nearest that there is

    At the edges a patch is read several times, so that all columns have a context of one length:
    the authors' code leaves columns at the edges out, of which a crop of two patches along K has
    no others.
    """
    _, along_j, along_k = grid
    j, k = (x.flatten() for x in torch.meshgrid(
        torch.arange(along_j), torch.arange(along_k), indexing="ij"
    ))  # fmt: skip
    parts = []
    for row in range(rows):
        radius = rows - 1 - row
        away = torch.arange(-radius, radius + 1)
        at_j = (j[:, None, None] + away[:, None]).clamp(0, along_j - 1)  # (P, 2r + 1, 1)
        at_k = (k[:, None, None] + away).clamp(0, along_k - 1)  # (P, 1, 2r + 1)
        parts.append(((row * along_j + at_j) * along_k + at_k).flatten(1))
    return torch.cat(parts, dim=1)
