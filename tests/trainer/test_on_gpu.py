"""What a GPU computes is what a CPU computes. Needs torch, NumPy, pydantic and pytest alone.

`benchmarks/gpu.sh` runs these on machines that have nothing else of the project's.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from models.recipe import CropPairs, PretrainRecipe
from trainer.data import augment
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.shuffle import Windows, draw_orders, draw_windows, shuffle_pixels
from trainer.methods.pcrl import Pcrl
from trainer.methods.views import Views, make_views
from trainer.randomness import generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CROPS = CropPairs(input_size=(32, 32, 16), crop_sizes=((32, 32, 16), (48, 48, 24)))
TRANSFORMS = [{}, {"rotation": "all", "max_scaling": 0.1, "shuffle_probability": 0.5}]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def resident(device: torch.device) -> Resident:
    random = np.random.default_rng(0)
    volumes = [random.random((60, 56, 40)).astype(np.float16) for _ in range(2)]
    return Resident.of(volumes, fill=[0, 0], at_least=(48, 48, 24), device=device)


def recipe_of(*, is_fused: bool) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "network": {"base_width": 4},
            "crops": CROPS,
            "method": {"queue_size": 64},
            "batch_size": 4,
            "fused": is_fused,
        }
    )


def moved(views: Views, device: torch.device) -> Views:
    names = [field.name for field in dataclasses.fields(views)]
    return Views(**{name: getattr(views, name).to(device) for name in names})


@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_clean_views_are_the_same_on_both_devices(transforms: dict[str, object]) -> None:
    crops = CROPS.model_copy(update=transforms)
    made = []
    for device in (CPU, CUDA):
        volumes = resident(device)
        pairs = PairSampler(crops, volumes.shapes).draw(6, generator(0, 1, "pairs"))
        geometry = augment.draw_geometry(crops, 6, generator(0, 1, "geometry"))
        made.append(augment.make_clean(volumes, crops, pairs, 0, geometry).cpu())

    torch.testing.assert_close(made[1], made[0], atol=1e-3, rtol=0)
    assert made[0].std() > 0.05


@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_corrupted_views_are_finite_differ_and_follow_from_the_step(
    transforms: dict[str, object],
) -> None:
    crops = CROPS.model_copy(update=transforms)
    recipe = recipe_of(is_fused=True).model_copy(update={"crops": crops})
    volumes = resident(CUDA)
    sampler = PairSampler(crops, volumes.shapes)

    first, again, other = (make_views(recipe, volumes, sampler, step) for step in (1, 1, 2))

    assert first.input_o.isfinite().all()
    assert torch.equal(first.input_o, again.input_o)
    assert not torch.equal(first.input_o, other.input_o)
    assert not torch.equal(first.input_o, first.clean_o)


@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_no_host_waits_for_the_gpu_while_views_are_made(transforms: dict[str, object]) -> None:
    crops = CROPS.model_copy(update=transforms)
    recipe = recipe_of(is_fused=True).model_copy(update={"crops": crops})
    volumes = resident(CUDA)
    sampler = PairSampler(crops, volumes.shapes)
    views = make_views(recipe, volumes, sampler, 1)  # kernels load, tables are cached

    torch.cuda.set_sync_debug_mode("error")
    try:
        make_views(recipe, volumes, sampler, 2)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(views.input_o.mean())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_shuffling_is_the_same_on_both_devices() -> None:
    shape = (30, 20, 24)
    views = torch.rand(3, 1, *shape)
    orders = draw_orders(shape, generator(0, 1, "orders"))
    windows = draw_windows(shape, 3, generator(0, 1, "extents"), generator(0, 1, "windows"))
    on_gpu = Windows(
        windows.counts,
        windows.view.to(CUDA),
        windows.rank.to(CUDA),
        windows.start.to(CUDA),
        windows.order.to(CUDA),
    )

    shuffled = shuffle_pixels(views.to(CUDA), on_gpu, [order.to(CUDA) for order in orders]).cpu()

    assert torch.equal(shuffled, shuffle_pixels(views, windows, orders))
    assert not torch.equal(shuffled, views)


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_step_of_pcrl_has_the_loss_and_gradients_of_a_cpu(is_fused: bool) -> None:
    recipe = recipe_of(is_fused=is_fused)
    volumes = resident(CPU)
    views = make_views(recipe, volumes, PairSampler(CROPS, volumes.shapes), 1)
    found = []
    for device in (CPU, CUDA):
        torch.manual_seed(0)
        method = Pcrl(recipe).to(device)
        loss = method.losses(moved(views, device)).total
        loss.backward()
        gradient = method.student.encoder.down64.first.conv.weight.grad
        assert gradient is not None
        found.append((loss.detach().cpu(), gradient.cpu()))

    (loss_cpu, gradient_cpu), (loss_gpu, gradient_gpu) = found
    torch.testing.assert_close(loss_gpu, loss_cpu, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient_gpu, gradient_cpu, atol=1e-4, rtol=2e-2)
    assert gradient_cpu.abs().max() > 1e-4
