"""Train in two ranks, whole or with one piece of the joining left out to see that a test notices.

    python joined_ranks.py RECIPE SCANS OUT PIECE...    the last state of each goes to OUT/PIECE

Forks the second rank, which is faster than importing torch twice.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch._dynamo  # the optimizer loads it: once here, not in each rank
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
    "nothing": nullcontext(),
    "norm": patch.object(joined_norm, "join", lambda module: None),
    "queue": patch.object(distributed, "concatenate", own_rows),
    "shuffle": patch.object(distributed, "share", in_drawn_order),
    "gradients": patch.object(distributed, "joined", own_gradients),
}


def main(recipe: str, scans: str, out: str, pieces: Sequence[str]) -> int:
    asked = PretrainRecipe.model_validate_json(Path(recipe).read_bytes())
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", launch.RENDEZVOUS: f"file://{out}/ranks"}
    other = os.fork()
    os.environ["RANK"] = "0" if other else "1"
    report = JsonLines() if other else Follower(JsonLines())
    with distributed.group("cpu") as device:
        for name in pieces:
            with PIECES[name], patch.object(pretrain.export, "publish"):
                pretrain.run(
                    asked, discover(Path(scans)), Path(out) / name, report,
                    device=device, should_stop=lambda: False,
                )  # fmt: skip
    if not other:
        os._exit(0)  # the threads of the process it was forked from cannot be joined
    return os.waitpid(other, 0)[1]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4], sys.argv[4:]))
