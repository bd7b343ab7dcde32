"""Train in two ranks with one piece of the joining left out, to see that a test notices.

    python control_ranks.py RECIPE SCANS OUT    the last state of each goes to OUT/PIECE

Forks the second rank, which is faster than importing torch twice.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from models.recipe import PretrainRecipe
from trainer import distributed, joined_norm, launch, pretrain
from trainer.data.scans import discover
from trainer.report import Follower, JsonLines


def own_rows(x: Tensor, dim: int = 0) -> Tensor:
    return x


def in_drawn_order(x: Tensor) -> Tensor:
    rows = x if x.is_floating_point() else torch.arange(len(x))
    return rows.chunk(distributed.num_ranks())[torch.distributed.get_rank()]


def own_gradients(losses: Callable[..., object], trained: object, normalised: torch.nn.Module):
    joined_norm.join(normalised)
    return losses


PIECES = {
    "norm": patch.object(joined_norm, "join", lambda module: None),
    "queue": patch.object(distributed, "concatenate", own_rows),
    "shuffle": patch.object(distributed, "share", in_drawn_order),
    "gradients": patch.object(distributed, "joined", own_gradients),
}


def main(recipe: str, scans: str, out: str) -> int:
    asked = PretrainRecipe.model_validate_json(Path(recipe).read_bytes())
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", launch.RENDEZVOUS: f"file://{out}/ranks"}
    other = os.fork()
    os.environ["RANK"] = "0" if other else "1"
    with distributed.group("cpu") as device:
        for name, left_out in PIECES.items():
            with left_out, patch.object(pretrain.export, "publish"):
                pretrain.run(
                    asked, discover(Path(scans)), Path(out) / name, Follower(JsonLines()),
                    device=device, should_stop=lambda: False,
                )  # fmt: skip
    if not other:
        os._exit(0)  # the threads of the process it was forked from cannot be joined
    return os.waitpid(other, 0)[1]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
