"""Several processes, one a GPU, that train as one.

torchrun or `trainer.launch` starts them. Each rank draws the numbers of the whole batch and makes
the views of its share of it, so that the ranks together do what one process does with the joined
batch. Alone, every function here is that of one process, and nothing is sent.

What waits goes over the host (gloo): whether to stop, when to go on. A GPU's tensors go over NCCL.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer import joined_norm
from trainer.errors import Preempted
from trainer.launch import RENDEZVOUS

PATIENCE = timedelta(days=1)
"""Of a rank for the others: the first may preprocess for hours. Whoever started us ends a run that
lost a rank."""

V = TypeVar("V")
L = TypeVar("L")


@contextmanager
def group(kind: str) -> Iterator[torch.device]:
    """Join the other ranks, if the environment says that there are any.

    The ranks of a run that ends, or stops on request, come out of here together. One that fails
    does not wait: the others see its connections close. The group itself lasts as long as the
    process, which must end without Python's teardown (`trainer.__main__`): torch 2.13 takes a gloo
    group down by waiting, with the GIL held, for a thread that waits for the GIL.

    Args:
        kind: `cpu` or `cuda`.

    Yields:
        This rank's device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device(kind)
        return
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        init_method=os.environ.get(RENDEZVOUS, "env://"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=PATIENCE,
    )
    try:
        yield device
    except Preempted:
        any_rank(False)
        raise
    any_rank(False)


def num_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this rank is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(x: Tensor) -> Tensor:
    """This rank's rows of what was drawn for the whole batch, (B, ...) to (B / R, ...)."""
    if num_ranks() == 1:
        return x
    return x.chunk(num_ranks())[dist.get_rank()]


def num_before(batch_size: int) -> int:
    """Rows of the whole batch that lower ranks have."""
    return dist.get_rank() * (batch_size // num_ranks()) if num_ranks() > 1 else 0


def concatenate(x: Tensor, dim: int = 0) -> Tensor:
    """What all ranks have, in their order, the same on each; carries no gradient."""
    if num_ranks() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(num_ranks())]
    dist.all_gather(parts, x)
    return torch.cat(parts, dim=dim)


def mean(x: Tensor) -> Tensor:
    """Mean over the ranks, the same on each; carries no gradient."""
    if num_ranks() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / num_ranks()


def largest(x: Tensor) -> Tensor:
    """Largest over the ranks, the same on each."""
    if num_ranks() == 1:
        return x
    found = x.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def any_rank(claim: bool) -> bool:
    """Whether it is true on some rank; waits for the other hosts, not for a GPU."""
    return bool(largest(torch.tensor(int(claim))))


@contextmanager
def first_then_others() -> Iterator[None]:
    """Do something on the first rank, and then, with what it left behind, on the others."""
    if not is_first():
        any_rank(False)
    yield
    if is_first():
        any_rank(False)


def joined(
    losses: Callable[[V], L], *, trained: nn.Module, normalised: nn.Module
) -> Callable[[V], L]:
    """The same losses; of several ranks, their backward pass leaves the joined batch's gradients.

    Args:
        losses: From this rank's views to the losses of them.
        trained: What holds the parameters.
        normalised: The part of it whose batch norm sees the joined batch.
    """
    if num_ranks() == 1:
        return losses
    joined_norm.join(normalised)
    # Buffers stay equal by themselves: joined statistics, the gathered queue.
    # torch 2.13 renamed `broadcast_buffers`, and warns of the old name.
    is_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    unsynced: dict[str, Any] = {
        "forward_sync_buffers" if is_renamed else "broadcast_buffers": False
    }
    return DistributedDataParallel(_Step(trained, losses), gradient_as_bucket_view=True, **unsynced)


class _Step(nn.Module):
    """Losses as a `forward`, which is what DistributedDataParallel hooks into."""

    def __init__(self, trained: nn.Module, losses: Callable[..., object]) -> None:
        super().__init__()
        self.trained = trained
        self.forward = losses
