"""The state machine of runs. Every change is one conditional UPDATE; every write carries the fence.

    queued ------claim-----> starting --started--> running --finish--> succeeded | failed
    interrupted --claim----> starting                 |
    starting | running ----request_cancel----> canceling --finish--> canceled (or as it ended)
    queued | interrupted --request_cancel----> canceled
    starting | running ----give_back, reap---> interrupted (canceling: canceled)

A claim raises the row's `fence`; whoever holds an older one (a worker that was frozen while its
run was taken back) can write nothing any more. `attempt` counts claims that were lost or crashed,
not those that were preempted. All times that decide anything are the database's own.

Who commits: the steps of a request (`requests`) leave it to their caller, who then rings
(`celery_app.ring`). The steps of workers (`claiming`, `working`, `ending`) and of upkeep
(`reaping`) are one transaction each and commit. `reading` changes nothing.
"""

from service.runs.claiming import claim
from service.runs.ending import finish, give_back
from service.runs.reading import artifact, artifacts, attempts, events_after, get, listing, metrics
from service.runs.reaping import FIRST_REMINDER_S, LATE_REMINDER_S, REMINDER_S, due, not_rung, reap
from service.runs.requests import create, request_cancel
from service.runs.words import Beat, Fenced, Lease, MetricPoint, NewArtifact, NewVersion, Outcome
from service.runs.working import heartbeat, record, started

__all__ = [
    "FIRST_REMINDER_S",
    "LATE_REMINDER_S",
    "REMINDER_S",
    "Beat",
    "Fenced",
    "Lease",
    "MetricPoint",
    "NewArtifact",
    "NewVersion",
    "Outcome",
    "artifact",
    "artifacts",
    "attempts",
    "claim",
    "create",
    "due",
    "events_after",
    "finish",
    "get",
    "give_back",
    "heartbeat",
    "listing",
    "metrics",
    "not_rung",
    "reap",
    "record",
    "request_cancel",
    "started",
]
