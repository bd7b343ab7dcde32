"""Rubik's Cube++: put a crop together that was turned like a Rubik's cube, against a critic.

Tao et al., "Revisiting Rubik's Cube: Self-supervised Learning with Volume-wise Transformation for
3D Medical Image Segmentation", MICCAI 2020, in P's form (section 7) or in its own
(docs/methods/rubiks_cube.md).

B batch, I J K voxels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import recipe as recipes
from models.networks.critic3d import Critic3d
from models.recipe import AnyPretrain, PretrainRecipe
from trainer.build import build_student
from trainer.data import cube
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.methods import adversarial, intensities
from trainer.methods.losses import Losses
from trainer.methods.method import Descent, Method
from trainer.methods.pairs import make_crops, shuffled_share
from trainer.optimizers import make_optimizer, set_rate
from trainer.randomness import generator, take


@dataclass(frozen=True, slots=True)
class Turned:
    """One batch of each of the critic's steps, then that of the network's.

    Attributes:
        clean: Crops as they are, (B, 1, I, J, K) each.
        disarranged: The same, turned.
        shares: Of the truth in the volumes between, for the gradient penalty, (B,) each.
    """

    clean: tuple[Tensor, ...]
    disarranged: tuple[Tensor, ...]
    shares: tuple[Tensor, ...]


class RubiksCube(Method[Turned, Losses]):
    """The U-Net and its critic."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe, PretrainRecipe) and isinstance(recipe.method, recipes.RubiksCube)
        self.spec = recipe.method
        self.student = build_student(recipe, fused=recipe.fused)
        self.critic = Critic3d(self.spec.critic_width, self.spec.critic_norm)

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Turned:
        """The batches of a step; that of turn t is drawn as if it were a step of its own."""
        count = self.spec.critic_steps + 1
        clean, disarranged, shares = [], [], []
        for turn in range((step - 1) * count + 1, step * count + 1):
            crops, _ = make_crops(self.recipe, volumes, sampler, turn)
            clean.append(crops)
            disarranged.append(self._turn(crops, turn))
            random = generator(self.recipe.seed, turn, "penalty")
            drawn = torch.rand(len(crops), generator=random)
            shares.append(to_device(drawn, crops.device))
        return Turned(tuple(clean), tuple(disarranged), tuple(shares))

    def losses(self, views: Turned) -> Losses:
        """What the network minimises on the last batch, against the critic as it is."""
        clean, disarranged = views.clean[-1], views.disarranged[-1]
        restored = intensities.restore(self.student(disarranged), self.recipe)
        difference = restored - clean
        error = difference.abs() if self.spec.distance == "l1" else difference**2
        reconstruction = error.mean()
        adversarial_part = adversarial.generator_loss(self.critic, restored, disarranged)
        return Losses(
            self.spec.reconstruction_weight * reconstruction
            + self.spec.adversarial_weight * adversarial_part,
            {"reconstruction": reconstruction, "adversarial": adversarial_part},
        )

    def critic_loss(self, views: Turned, turn: int) -> Tensor:
        """What the critic minimises on one of its batches, against the network as it is."""
        disarranged = views.disarranged[turn]
        with torch.no_grad():
            restored = intensities.restore(self.student(disarranged), self.recipe)
        return adversarial.critic_loss(
            self.critic,
            views.clean[turn],
            restored,
            disarranged,
            share=views.shares[turn],
            penalty_weight=self.spec.penalty_weight,
        )

    def descent(self, device: torch.device) -> Descent:
        """Two optimizers that take turns."""
        return Game(self, device)

    def _turn(self, crops: Tensor, turn: int) -> Tensor:
        """Disarrange the crops of a batch."""
        assert isinstance(self.recipe, PretrainRecipe)
        size, side, batch = self.recipe.crops.input_size, self.spec.side, self.recipe.batch_size
        random = generator(self.recipe.seed, turn, "turns")
        rows = shuffled_share(self.recipe, turn)
        if self.spec.turned == "slabs":
            slabs = take(cube.draw_slabs(batch, size, side, random), rows)
            return cube.turn_slabs(crops, slabs, side)
        rotation = cube.draw_rotations(batch, size, side, random)[rows]
        return cube.turn_subvolumes(crops, rotation, side)


class Game:
    """Steps of the critic, then one of the network; two optimizers of the recipe's kind."""

    def __init__(self, method: RubiksCube, device: torch.device) -> None:
        recipe = method.recipe
        self._method, self._device = method, device
        self._network = make_optimizer(method.student.parameters(), recipe)
        self._critic = make_optimizer(method.critic.parameters(), recipe)
        self._losses = torch.compile(method.losses) if recipe.compile else method.losses
        self.rate = 0.0

    def step(self, views: Turned, step: int) -> Losses:
        """The losses of the network, with the critic's last one among their parts."""
        method = self._method
        set_rate(self._critic, method.recipe, step)
        self.rate = set_rate(self._network, method.recipe, step)
        for turn in range(method.spec.critic_steps):
            critic_loss = self._descend_critic(views, turn)
        with self._precision():
            losses = self._losses(views)
        self._network.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]  # of torch
        self._network.step()
        return Losses(losses.total, {**losses.parts, "critic": critic_loss})

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers'."""
        return {"network": self._network.state_dict(), "critic": self._critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Both optimizers'."""
        self._network.load_state_dict(state["network"])
        self._critic.load_state_dict(state["critic"])

    def _descend_critic(self, views: Turned, turn: int) -> Tensor:
        with self._precision():
            loss = self._method.critic_loss(views, turn)
        self._critic.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        self._critic.step()
        return loss.detach()

    def _precision(self) -> torch.autocast:
        on_gpu = self._device.type == "cuda"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=on_gpu)
