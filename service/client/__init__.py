"""The REST API as typed methods, over httpx: for the command line, the demo, and scripts.

It answers with the same frozen models as the API. A refusal is an `ApiError` with the problem's
code. Creating calls carry an `Idempotency-Key`, so a connection that breaks is tried again safely.
"""

from service.answers import ApiError
from service.client.batches import Batches
from service.client.experiments import Experiments
from service.client.inference import Inference
from service.client.models import Models
from service.client.projects import Projects
from service.client.scans import Scans

__all__ = ["ApiError", "Client"]


class Client(Scans, Models, Inference, Batches, Experiments, Projects):
    """One service, token and project; a context manager. Safe to use from several threads."""
