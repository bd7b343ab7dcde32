"""What the step must not do: wait for the GPU, or break out of a compiled graph."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.recipe import PretrainRecipe, PretrainRecipe2d
from trainer.data import augment, augment2d, images2d, resident
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods import pairs, views
from trainer.methods.pcrl import Losses, Pcrl
from trainer.randomness import generator


def make(
    preset: str, dims: int, device: str
) -> tuple[Pcrl, Resident | ResidentImages, PairSampler | None]:
    at = torch.device(device)
    recipe = RECIPES[dims](preset)
    torch.manual_seed(0)
    method = Pcrl(recipe).train().to(at)
    if isinstance(recipe, PretrainRecipe2d):
        return method, ResidentImages(torch.zeros(3, 1, 64, 64, dtype=torch.uint8, device=at)), None
    volume = np.random.default_rng(0).random((32, 32, 24)).astype(np.float16)
    volumes = Resident.of([volume] * 2, fill=[0, 0], at_least=(24, 24, 16), device=at)
    return method, volumes, PairSampler(recipe.crops, volumes.shapes)


RECIPES = {
    2: lambda preset: PretrainRecipe2d.model_validate(
        {
            "network": {"kind": "resnet18_unet2d", "width": 8},
            "preprocessing": {"size": 64},
            "crops": {"input_size": 64, "cutout_size": 8},
            "method": {"preset": preset, "embedding_size": 8, "queue_size": 40},
            "batch_size": 4,
        }
    ),
    3: lambda preset: PretrainRecipe.model_validate(
        {
            "network": {"base_width": 2},
            "preprocessing": {"spacing_mm": [2, 2, 2]},
            "crops": {"input_size": [16, 16, 16], "crop_sizes": [[16, 16, 16], [24, 24, 16]]},
            "method": {"preset": preset, "embedding_size": 8, "queue_size": 40},
            "batch_size": 4,
        }
    ),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["paper", "recommended"])
@pytest.mark.parametrize("dims", [2, 3])
def test_no_host_waits_for_the_gpu_in_a_step(preset: str, dims: int) -> None:
    method, volumes, sampler = make(preset, dims, "cuda")
    optimizer = torch.optim.SGD(method.trained(), lr=0.1, momentum=0.9, fused=True)

    def step(number: int) -> Losses:
        batch = method.make_views(volumes, sampler, number)
        with torch.autocast("cuda", torch.bfloat16):
            losses = method.losses(batch)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        method.update(losses)
        return losses

    step(1)  # kernels load, memory is reserved
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step(2)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(losses.total)  # the mode sees what waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Copies(TorchDispatchMode):
    """Counts what is copied from the host to a device without values, `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        sources = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 0]
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            self.seen += [str(func) for x in sources if x.device.type == "cpu"]
        return out


@pytest.mark.parametrize("preset", ["paper", "recommended"])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_step_asks_the_device_for_no_value_and_sends_it_nothing_on_the_side(
    preset: str, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `meta`, where a tensor has no values to wait for; every copy goes through `to_device`."""
    method, volumes, sampler = make(preset, dims, "meta")
    sent = []

    def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(x)
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    for module in (augment, augment2d, images2d, resident, pairs, views):
        monkeypatch.setattr(module, "to_device", to_device)
    for module in (pairs, views):
        monkeypatch.setattr(module, "generator", lambda *key: generator(*key[:3]))
    monkeypatch.setattr(
        augment, "uniform_noise", lambda shape, random: torch.empty(shape, device="meta")
    )
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    with Copies() as copies:
        losses = method.losses(method.make_views(volumes, sampler, 1))
        losses.total.backward()
        method.update(losses)

    assert len(sent) > 10 and not copies.seen
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(losses.total.detach())
    with Copies() as copies:
        sent[0].to("meta")
    assert copies.seen


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_is_one_compiled_graph_of_the_same_losses() -> None:
    """Captured, not generated: inductor takes ten minutes for it on two cores."""
    method, volumes, sampler = make("paper", 3, "cpu")
    graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()  # what other tests compiled of the same code
    captured = torch.compile(method.losses, backend=keep, fullgraph=True)  # a break would raise

    for number in (1, 2, 3):
        batch = method.make_views(volumes, sampler, number)
        torch.testing.assert_close(captured(batch).total, method.losses(batch).total)

    assert 1 <= len(graphs) <= 2  # the mix becomes a number
