"""What the step must not do: wait for the GPU, or break out of a compiled graph."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.recipe import PretrainRecipe
from trainer.data import augment, resident
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods import pcrl
from trainer.methods.pcrl import Pcrl
from trainer.randomness import generator


def make(recipe: PretrainRecipe, device: str) -> tuple[Pcrl, Resident, PairSampler]:
    volume = np.random.default_rng(0).random((32, 32, 24)).astype(np.float16)
    at = torch.device(device)
    volumes = Resident.of([volume], fill=[0], at_least=(24, 24, 16), device=at)
    torch.manual_seed(0)
    method = Pcrl(recipe).train().to(at)
    return method, volumes, PairSampler(recipe.crops, volumes.shapes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_host_waits_for_the_gpu_in_a_step(pretrain_recipe: PretrainRecipe) -> None:
    method, volumes, sampler = make(pretrain_recipe, "cuda")
    optimizer = torch.optim.SGD(method.trained(), lr=0.1, momentum=0.9, fused=True)

    def step(number: int) -> None:
        views = method.make_views(volumes, sampler, number)
        with torch.autocast("cuda", torch.bfloat16):
            losses = method.losses(views)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        method.update(losses)

    step(1)  # kernels load, memory is reserved
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(method.queue[0, 0])  # the mode sees what waits
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


def test_a_step_asks_the_device_for_no_value_and_sends_it_nothing_on_the_side(
    pretrain_recipe: PretrainRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `meta`, where a tensor has no values to wait for; every copy goes through `to_device`."""
    method, volumes, sampler = make(pretrain_recipe, "meta")
    sent = []

    def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(x)
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    for module in (augment, resident, pcrl):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(pcrl, "generator", lambda *key: generator(*key[:3]))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    with Copies() as copies:
        losses = method.losses(method.make_views(volumes, sampler, 1))
        losses.total.backward()
        method.update(losses)

    assert len(sent) > 10 and not copies.seen
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(method.queue[0, 0].detach())
    with Copies() as copies:
        sent[0].to("meta")
    assert copies.seen


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_is_one_compiled_graph_of_the_same_losses(pretrain_recipe: PretrainRecipe) -> None:
    """Captured, not generated: inductor takes ten minutes for it on two cores."""
    method, volumes, sampler = make(pretrain_recipe, "cpu")
    captured = torch.compile(method.losses, backend="eager", fullgraph=True)

    for number in (1, 2, 3):
        views = method.make_views(volumes, sampler, number)
        torch.testing.assert_close(captured(views).total, method.losses(views).total)

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the mix becomes a number
    assert not torch._dynamo.utils.counters["graph_break"]
