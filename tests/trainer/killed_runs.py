"""Run one pretraining that is killed (SIGKILL) again and again, each try in a forked process.

    python killed_runs.py KILLS ARGUMENT...    KILLS: JSON list of steps; the rest as for trainer

A process that has imported torch forks in milliseconds; starting it anew takes seconds. The kill
comes up to a step's time after its step was reported: in a computation, or while a checkpoint is
written. Prints one JSON object a try: wait status, steps resumed from, losses by step.
"""

import json
import os
import random
import signal
import sys
import time
from typing import Any

import torch._dynamo

import trainer.finetune
import trainer.pretrain
from trainer.__main__ import main

assert trainer.finetune and trainer.pretrain  # all that `main` imports, once;
assert torch._dynamo  # and what the first optimizer does


def attempt(arguments: list[str], kill_at: int, delay_s: float) -> dict[str, Any]:
    """One try, killed `delay_s` after it reported step `kill_at`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.close(read)
        os.close(write)
        os._exit(main(arguments))
    os.close(write)
    resumed: list[str] = []
    losses: dict[int, float] = {}
    with os.fdopen(read) as lines:
        for line in lines:
            event = json.loads(line)
            if "resuming after" in event.get("message", ""):
                resumed.append(event["message"])
            if event["event"] == "metric":
                losses[event["step"]] = event["values"]["loss"]
            if event["event"] == "metric" and event["step"] == kill_at:
                time.sleep(delay_s)
                os.kill(child, signal.SIGKILL)
                break
    return {"status": os.waitpid(child, 0)[1], "resumed": resumed, "losses": losses}


if __name__ == "__main__":
    chance = random.Random(11)
    for step in json.loads(sys.argv[1]):
        print(json.dumps(attempt(sys.argv[2:], step, chance.uniform(0.0, 0.06))), flush=True)
