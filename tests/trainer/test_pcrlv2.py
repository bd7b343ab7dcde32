"""PCRLv2's crops, corruption and loss, against slow definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from models.recipe import PcrlV2 as PcrlV2Recipe
from models.recipe import PretrainRecipe, PretrainRecipe2d
from trainer.data.degrade import Degradation, degrade, draw, swap_patches
from trainer.data.local_boxes import draw_locals
from trainer.data.resident import Resident
from trainer.data.sampling import Pairs, PairSampler
from trainer.methods.pcrlv2 import PcrlV2, Views, agree

CPU = torch.device("cpu")
RECIPE = PretrainRecipe.model_validate(
    {
        "network": {"base_width": 2},
        "crops": {"input_size": [16, 16, 16], "crop_sizes": [[24, 24, 16], [16, 16, 16]]},
        "method": {
            "name": "pcrlv2",
            "num_locals": 2,
            "local_sizes": [[8, 8, 8]],
            "local_input_size": [8, 8, 8],
        },
        "batch_size": 3,
        "num_steps": 10,
    }
)


def world(step: int = 1) -> tuple[PcrlV2, Views]:
    torch.manual_seed(0)
    volume = np.random.default_rng(0).random((32, 32, 24)).astype(np.float16)
    volumes = Resident.of([volume], fill=[0], at_least=(24, 24, 16), device=CPU)
    method = PcrlV2(RECIPE).train()
    return method, method.make_views(volumes, PairSampler(RECIPE.crops, volumes.shapes), step)


def test_agreement_is_simsiams_and_stops_at_the_projections() -> None:
    z_one, p_one, z_other, p_other = torch.randn(4, 5, 6, requires_grad=True).unbind()
    slow = 0.0
    for b in range(5):
        for p, z in ((p_one[b], z_other[b]), (p_other[b], z_one[b])):
            p, z = p.tolist(), z.tolist()
            dot = sum(x * y for x, y in zip(p, z, strict=True))
            slow -= dot / math.hypot(*p) / math.hypot(*z) / 2 / 5

    loss = agree(z_one, p_one, z_other, p_other)

    assert math.isclose(float(loss.detach()), slow, rel_tol=1e-5)
    still, moved = torch.autograd.grad(loss, (z_one, p_one), allow_unused=True)
    assert still is None and moved is not None and bool(moved.any())


def test_the_loss_is_restoration_agreement_and_both_of_a_level() -> None:
    method, views = world(step=4)
    level, student = views.level, method.student

    losses = method.losses(views)

    def levels(images: torch.Tensor) -> list[torch.Tensor]:
        features = student.encoder(images)
        at256 = student.decoder.up256(features.bottleneck, features.skip256)
        at128 = student.decoder.up128(at256, features.skip128)
        return [at256, at128, student.decoder.up64(at128, features.skip64)]

    def heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = method.projections[level](x.mean(dim=(2, 3, 4)))
        return z, method.predictions[level](z)

    one, other = (levels(seen) for seen in views.crops.seen)
    whole = [torch.sigmoid(student.out(x[-1])) for x in (one, other)]
    restored = sum(F.mse_loss(x, y) for x, y in zip(whole, views.crops.clean, strict=True)) / 2
    partial = [
        F.interpolate(
            torch.sigmoid(method.mid_outputs[level](x[level])), (16, 16, 16), mode="trilinear"
        )
        for x in (one, other)
    ]
    mid = sum(F.mse_loss(x, y) for x, y in zip(partial, views.crops.clean, strict=True)) / 2
    (z1, p1), (z2, p2) = heads(one[level]), heads(other[level])
    zl, pl = heads(levels(views.crops.seen_locals)[level])
    pairs = [
        (zl[n * 3 : n * 3 + 3], pl[n * 3 : n * 3 + 3], z, p)
        for n in (0, 1)
        for z, p in ((z1, p1), (z2, p2))
    ]
    local = sum(agree(*pair) for pair in pairs) / 4
    beta = 0.5 * (1 + math.cos(math.pi * 3 / 10))
    expected = restored + agree(z1, p1, z2, p2) + local + beta * mid
    assert torch.allclose(losses.total, expected, atol=1e-5)
    assert losses.parts.keys() == {
        "reconstruction", "agreement", "local_agreement", "level_reconstruction",
    }  # fmt: skip
    assert {world(step)[1].level for step in range(1, 9)} == {0, 1, 2}


def test_swapped_patches_are_those_of_the_grid() -> None:
    x = torch.rand(2, 8, 8, 8)
    order = torch.stack([torch.tensor([7, 1, 2, 3, 4, 5, 6, 0]), torch.arange(8)])

    moved = swap_patches(x, order, (4, 4, 4))

    slow = x.clone()
    slow[0, :4, :4, :4], slow[0, 4:, 4:, 4:] = x[0, 4:, 4:, 4:], x[0, :4, :4, :4]
    assert torch.equal(moved, slow) and not torch.equal(moved, x)


def test_a_view_is_blurred_bent_and_left_in_place() -> None:
    view = torch.rand(1, 1, 16, 16, 8)
    drawn = Degradation(
        sigma=torch.tensor([[1.0, 0.5, 0.7]]),
        noise_std=torch.zeros(1),
        log_gamma=torch.tensor([0.2]),
        order=torch.arange(2 * 4 * 2)[None],
    )

    out = degrade(view, drawn, (8, 4, 4), torch.Generator().manual_seed(0))

    blurred = gaussian_filter(view[0, 0].double().numpy(), (1.0, 0.5, 0.7), mode="nearest")
    assert np.allclose(out[0, 0].numpy(), blurred ** math.exp(0.2), atol=1e-5)


def test_what_is_drawn_lies_in_its_range_and_swaps_in_pairs() -> None:
    spec = PcrlV2Recipe()

    drawn = draw(spec, 2.0, (64, 64, 32), 50, torch.Generator().manual_seed(0))

    assert float(drawn.sigma.max()) <= 2 and float(drawn.noise_std.max()) <= 0.25
    assert -0.3 <= float(drawn.log_gamma.min()) < 0 < float(drawn.log_gamma.max()) <= 0.3
    again = drawn.order.gather(1, drawn.order)
    assert torch.equal(again, torch.arange(1024).repeat(50, 1))
    assert ((drawn.order != torch.arange(1024)).sum(dim=1) == 200).all()


def test_local_boxes_lie_in_the_volume_and_near_the_global_ones() -> None:
    pairs = Pairs(
        volume=torch.tensor([0, 1]),
        size=torch.zeros(2, 2, dtype=torch.long),
        start=torch.tensor([[[0, 0, 0], [4, 0, 2]], [[20, 20, 8], [24, 16, 8]]]),
    )
    shapes = torch.tensor([[40, 40, 24], [40, 40, 24]])
    random = torch.Generator().manual_seed(0)

    drawn = draw_locals(
        pairs, ((16, 16, 16),), ((8, 8, 8), (16, 16, 24)), shapes,
        num_locals=100, margin=3, random=random,
    )  # fmt: skip

    extent = torch.tensor([(8, 8, 8), (16, 16, 24)])[drawn.size[:, 0]]
    start = drawn.start[:, 0]
    assert drawn.volume.tolist() == [0, 1] * 100
    assert (start >= 0).all() and (start + extent <= shapes[0]).all()
    small = drawn.size[:, 0] == 0
    first = small & (drawn.volume == 0)
    assert (start[first] + 8 <= torch.tensor([23, 19, 21])).all()
    assert (start[first].amax(dim=0) == torch.tensor([15, 11, 13])).all()
    assert (start[small & (drawn.volume == 1)] >= torch.tensor([17, 13, 5])).all()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValidationError, match="pcrlv2's num_swaps is for 3D; this is 2D"):
        PretrainRecipe2d.model_validate({"method": {"name": "pcrlv2", "num_swaps": 3}})
    with pytest.raises(ValidationError, match="pcrlv2's local_side is for 2D; this is 3D"):
        PretrainRecipe.model_validate({"method": {"name": "pcrlv2", "local_side": 64}})
    with pytest.raises(ValidationError, match="must divide 8"):
        PcrlV2Recipe(swap_patch=(3, 4, 4))
    assert PretrainRecipe.model_validate({"method": {"name": "pcrlv2"}}).crops.min_iou == 0.3
