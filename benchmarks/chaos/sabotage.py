"""The negative controls of the chaos harness, inside the processes that it starts.

Never a setting of the product: this module patches it, and only the harness loads it.

    fencing        a worker's write goes through whatever fence and state the run has
    republishing   upkeep rings for nobody: a lost message stays lost
"""

from __future__ import annotations

import os
from typing import Any

from service import runs
from service.db import Run
from service.lease import Keeper
from service.runs import writing


def _anyone(lease: runs.Lease, states: object = None) -> Any:
    return Run.id == lease.run_id


def apply(without: str) -> None:
    """Take one of the protections away from this process."""
    if without == "fencing":
        writing.is_ours = _anyone
        Keeper.fenced = property(lambda self: False)  # type: ignore[method-assign, assignment]
    elif without == "republishing":
        runs.due = lambda session, *, limit=50: []


apply(os.environ.get("CHAOS_WITHOUT", ""))

if __name__ == "__main__":
    from service.cli import main

    main()
