"""What a method of pretraining is, as the loop of `trainer.pretrain` and the export see it.

A method is networks and whatever else a step leaves behind (queues, averages), as one module whose
`state_dict` holds all of it: a resume needs that, the descent's state and the step, and nothing
else. What a batch is follows from the recipe's seed and the step alone.

For another method: a recipe in `models/recipe/NAME.py` (listed in `models.recipe.methods`), a
subclass of `Method` in `trainer/methods/NAME.py` (listed in `trainer.methods`), and a page
`docs/methods/NAME.md`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from models.recipe import AnyPretrain
from trainer import distributed
from trainer.build import Student
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.optimizers import make_optimizer, set_rate
from trainer.report import Report


class StepLosses(Protocol):
    """What a step minimises, and what the metrics show of it."""

    @property
    def total(self) -> Tensor:
        """Scalar; carries the gradient."""

    def named(self) -> dict[str, Tensor]:
        """Detached scalars by their names in the metrics; `loss` is the total."""


V = TypeVar("V")
L = TypeVar("L", bound=StepLosses)


class Method(nn.Module, ABC, Generic[V, L]):
    """Networks, views and losses of one method.

    Attributes:
        recipe: What was asked for.
        student: What the export takes: its `encoder` becomes the served embedding, and with it
            goes its decoder, where the method trains one (`trainer.build.build_student`). Served
            with the recipe's `preprocessing`.
    """

    student: Student

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__()
        self.recipe = recipe

    def prepare(
        self,
        volumes: Resident | ResidentImages,
        sampler: PairSampler | None,
        report: Report,
        should_stop: Callable[[], bool],
    ) -> bool:
        """Learn what the training needs to know, once, before the first step of a fresh run.

        Returns:
            Whether anything was learnt, which is then saved; a resume does not ask again.

        Raises:
            Preempted: Stopped on request.
        """
        return False

    @abstractmethod
    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> V:
        """Draw and make this rank's share of a step's batch.

        Args:
            volumes: What views are cut from: images, if the recipe is in 2D.
            sampler: Of crops of volumes; None for images.
            step: From 1.
        """

    @abstractmethod
    def losses(self, views: V) -> L:
        """What one batch costs; changes nothing but the statistics of batch norms."""

    def update(self, losses: L) -> None:
        """After the optimizer's step: whatever moves without a gradient."""

    def trained(self) -> list[nn.Parameter]:
        """Parameters that the optimizer moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def descent(self, device: torch.device) -> Descent:
        """How a batch moves the networks: one optimizer, unless the method plays a game of two.

        Called once, with the method's state as the run starts or resumes.
        """
        return Downhill(self, device)


class Descent(Protocol):
    """One step of optimisation. Its `state_dict` holds the optimizers' state."""

    def step(self, views: Any, step: int) -> StepLosses:
        """Losses of a batch, after all parameters and whatever follows them have moved.

        Args:
            views: What the method's `make_views` made.
            step: From 1.
        """

    @property
    def rate(self) -> float:
        """Learning rate of the last step, for the metrics."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, of types that a checkpoint can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Downhill:
    """Everything that a method trains, by one optimizer down its one loss."""

    def __init__(self, method: Method[V, L], device: torch.device) -> None:
        recipe = method.recipe
        self._method, self._device = method, device
        self._optimizer = make_optimizer(method.trained(), recipe)
        self._losses = distributed.joined(
            torch.compile(method.losses) if recipe.compile else method.losses,
            trained=method,
            normalised=method.student,
        )
        self.rate = 0.0

    def step(self, views: Any, step: int) -> StepLosses:
        """Forward, backward, the optimizer's step, the method's update."""
        self.rate = set_rate(self._optimizer, self._method.recipe, step)
        on_gpu = self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=on_gpu):
            losses = self._losses(views)
        self._optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]  # of torch
        self._optimizer.step()
        self._method.update(losses)
        return losses

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The optimizer's."""
        self._optimizer.load_state_dict(state)
