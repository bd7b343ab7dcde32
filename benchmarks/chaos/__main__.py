"""`python -m benchmarks.chaos --uploads 60 --kills 8`: random SIGKILL under real work.

The last line is one JSON object; the exit status is 0 only if nothing is lost, doubled or stuck and
everything was drained within two leases of the last kill.

"Drained" is: every segmentation has ended, and the training worker trains again if trainings are
left (they then have `--patience` seconds to end).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import ColumnElement, and_, exists, func, not_, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.chaos import load, verdict
from benchmarks.chaos.killer import Killer
from benchmarks.chaos.stack import ChaosStack, Unavailable
from service import db
from service.db import Run, db_now
from service.storage import Store

UNAVAILABLE = 69
MEMORY = Path("/dev/shm")  # SIGKILL loses no file of a tmpfs, and fsync costs nothing
FREEZE_LEASES = 1.5
WAKING_S = 5.0


def main() -> int:
    """Run it; returns the exit status."""
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leave nobody behind
    folder = Path(tempfile.mkdtemp(prefix="pcrl-chaos-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        stack = ChaosStack(folder, embedded=args.embedded, without=args.without, lease_s=args.lease)
    except Unavailable as error:
        print(error, file=sys.stderr)
        shutil.rmtree(folder)
        return UNAVAILABLE
    is_good = False
    try:
        is_good = _run(stack, args)
    finally:
        stack.stop()
        if is_good or not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"kept in {folder}", file=sys.stderr)
    return 0 if is_good else 1


def _run(stack: ChaosStack, args: argparse.Namespace) -> bool:
    began = time.monotonic()
    token = stack.start()
    load.register_model(stack.settings, stack.folder)
    accepted = load.Accepted()
    killer = Killer(stack, args.seed, only=args.only, trains=args.trainings > 0)
    until = began + args.timeout
    if args.freezes:
        accepted.gate = args.uploads / (args.freezes + 1)
    threads = load.send_all(
        stack.url, token, accepted,
        uploads=args.uploads, clients=args.clients, trainings=args.trainings, until=until,
    )  # fmt: skip
    _strike(killer, accepted, args, until)
    for thread in threads:
        thread.join()
    since = max(killer.last_at, accepted.last_at)
    engine = db.connect(stack.settings.database_url)
    sessions = db.sessions(engine)
    limit_s = 2 * stack.settings.lease_s
    drain_s = _wait(sessions, _undrained(), since, since + limit_s + args.patience)
    _wait(sessions, Run.state.not_in(db.TERMINAL), since, since + limit_s + args.patience)
    if args.freezes:  # whoever woke last may still write: that is what is looked for
        time.sleep(stack.settings.lease_s + WAKING_S)
    with sessions() as session:
        found = verdict.judge(session, Store(stack.settings.data_dir), accepted)
    engine.dispose()
    killer.close()
    sent = len(accepted.segmentations)
    if sent != args.uploads or len(accepted.trainings) != args.trainings:
        found.lost.append(f"only {sent} uploads were accepted")
    for kind in ("lost", "duplicated", "stuck"):
        for line in getattr(found, kind)[:20]:
            print(f"{kind}: {line}")
    for line in accepted.faults[:20]:
        print(f"answered: {line}")
    slowest = sorted(accepted.latencies_s)[int(len(accepted.latencies_s) * 0.99)]
    print(
        f"killed {dict(killer.killed)}, froze {killer.frozen}; {len(accepted.trainings)} trainings"
    )
    print(f"p99 of a request {slowest:.1f} s; {time.monotonic() - began:.0f} s in all")
    num_kills = sum(killer.killed.values())
    report = {
        "uploads": sent,
        "kills": num_kills,
        "lost": len(found.lost),
        "duplicated": len(found.duplicated),
        "stuck": len(found.stuck),
        "drain_s": round(drain_s, 1),
        "seed": args.seed,
    }
    print(json.dumps(report), flush=True)
    is_whole = num_kills == args.kills and killer.frozen == args.freezes
    is_clean = not (found.lost or found.duplicated or found.stuck or accepted.faults)
    return is_whole and is_clean and drain_s <= limit_s


def _strike(
    killer: Killer, accepted: load.Accepted, args: argparse.Namespace, until: float
) -> None:
    """Kill and freeze, evenly over the uploads and a little at random."""
    blows = ["kill"] * args.kills + ["freeze"] * args.freezes
    killer.random.shuffle(blows)
    given = 0
    tries = 0
    while given < len(blows) and time.monotonic() < until and tries < 3 * len(blows):
        if len(accepted.segmentations) < args.uploads * (given + 0.3) / (len(blows) + 1):
            time.sleep(0.02)
            continue
        tries += 1
        if blows[given] == "kill":
            kind = killer.kill()
            given += kind is not None
            what = f"killed {kind}" if kind else "missed"
        else:
            seconds = FREEZE_LEASES * args.lease + 2.0
            hit = killer.freeze(seconds, should_end=lambda: time.monotonic() > until)
            given += hit
            accepted.gate = args.uploads * (given + 1) / (args.freezes + 1)
            what = "froze a worker" if hit else "missed"
        print(f"{len(accepted.segmentations)} accepted: {what}", flush=True)
        time.sleep(killer.random.uniform(0.0, 0.3))
    accepted.gate = float("inf")


def _undrained() -> ColumnElement[bool]:
    """Segmentations that have not ended, and trainings that wait while nobody trains."""
    held = and_(Run.state.in_(db.HELD), Run.lease_until > db_now(), Run.suspect_at.is_(None))
    trains = exists().where(Run.queue == "train", held).correlate(None)
    return and_(Run.state.not_in(db.TERMINAL), or_(Run.queue == "inference", not_(trains)))


def _wait(
    sessions: sessionmaker[Session], condition: ColumnElement[bool], since: float, until: float
) -> float:
    """Wait until no run is like this; seconds from `since`."""
    while True:
        now = time.monotonic()
        try:
            with sessions() as session:
                left = session.scalar(select(func.count()).select_from(Run).where(condition))
        except SQLAlchemyError:
            left = None
        if left == 0 or now > until:
            return now - since
        time.sleep(0.1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--uploads", type=int, default=60)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--only", help="one kind of process alone")
    parser.add_argument("--freezes", type=int, default=0, help="SIGSTOP beyond the lease")
    parser.add_argument("--trainings", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lease", type=float, default=8.0, help="lease_s of the stack")
    parser.add_argument("--embedded", action="store_true", help="SQLite and the folder broker")
    parser.add_argument("--without", choices=("fencing", "republishing"), help="a control")
    parser.add_argument("--patience", type=float, default=120.0, help="for what is not drained, s")
    parser.add_argument("--timeout", type=float, default=600.0, help="for the clients, s")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a failure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
