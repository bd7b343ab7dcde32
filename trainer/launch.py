"""Start one training process a GPU on this machine, and end as they end.

`torchrun` starts them too, but it ends with 1 whatever its children said, moves them out of the
process group that the supervisor kills, and grants 30 s for a last checkpoint (torch 2.13,
elastic/multiprocessing). Here they stay in the group, a stop waits for their checkpoints, and the
exit status is theirs. They meet at a file and talk over the loopback interface: no port is open to
the network.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from models.recipe import AnyPretrain
from trainer import errors
from trainer.errors import DataError

RENDEZVOUS = "TRAINER_RENDEZVOUS"
"""Environment variable with the address at which the ranks meet; torchrun has its own."""
SUPERVISOR = "TRAINER_SUPERVISOR_PID"
"""Environment variable with the process id of whoever started the training and must outlive it."""
POLL_S = 0.1
GRACE_S = 10.0
"""How long the others may go on when one has failed."""
_COUNT = "import torch; print(torch.cuda.device_count())"


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m trainer` with these arguments in several processes.

    Returns:
        The exit status of the one that failed; -n if signal n killed it.
    """
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
        ranks = [
            subprocess.Popen(  # noqa: S603  # our own command
                [sys.executable, "-m", "trainer", *arguments],
                env={**os.environ, **_environment(Path(folder), rank, num_processes)},
            )
            for rank in range(num_processes)
        ]

        def pass_on(number: int, frame: FrameType | None) -> None:
            _signal(ranks, signal.SIGTERM)

        signal.signal(signal.SIGTERM, pass_on)
        signal.signal(signal.SIGINT, pass_on)
        try:
            return _wait(ranks)
        finally:
            _signal(ranks, signal.SIGKILL)
            for rank in ranks:
                rank.wait()


def choose(recipe: AnyPretrain, asked: int) -> int:
    """How many processes to start.

    Args:
        recipe: What they will train.
        asked: How many; 0 is one a visible GPU, as far as the batch can be shared out.

    Raises:
        DataError: `bad_processes`.
    """
    if asked:
        check(recipe, asked)
        return asked
    counted = subprocess.run(  # noqa: S603  # our own command
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True
    )
    visible = int(counted.stdout)
    return max(n for n in range(1, max(visible, 1) + 1) if _can_share(recipe, n))


def check(recipe: AnyPretrain, num_processes: int) -> None:
    """Refuse a number of processes between which a batch cannot be shared out evenly.

    Raises:
        DataError: `bad_processes`.
    """
    if not _can_share(recipe, num_processes):
        raise DataError(
            "bad_processes",
            f"{num_processes} processes cannot share batch_size {recipe.batch_size} in "
            f"{recipe.method.num_groups(recipe.batch_size)} groups evenly, whole groups each",
        )


def _can_share(recipe: AnyPretrain, num_processes: int) -> bool:
    groups = recipe.method.num_groups(recipe.batch_size)
    return num_processes == 1 or (recipe.batch_size % groups == 0 and groups % num_processes == 0)


def _environment(folder: Path, rank: int, num_processes: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        RENDEZVOUS: f"file://{folder}/ranks",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all, but not for ranks that still run some time after another has failed.

    They wait for the failed one, and fail in their turn if they notice.
    """
    give_up_at = math.inf
    while True:
        statuses = [rank.poll() for rank in ranks]
        ended = [status for status in statuses if status is not None]
        failures = [status for status in ended if status not in (0, errors.PREEMPTED)]
        if failures and give_up_at == math.inf:
            give_up_at = time.monotonic() + GRACE_S
        if len(ended) == len(ranks) or time.monotonic() > give_up_at:
            break
        time.sleep(POLL_S)
    if failures:
        # A rank that lost the others fails with 1, or aborts: what is more specific came first.
        lost = (errors.FAILED, -signal.SIGABRT)
        return min(failures, key=lambda status: (status in lost, status))
    return errors.PREEMPTED if errors.PREEMPTED in ended else 0


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)
