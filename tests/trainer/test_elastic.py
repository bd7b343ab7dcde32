"""Elastic deformation equals SciPy's Gaussian filter and map_coordinates."""

import numpy as np
import torch
from scipy import ndimage

from trainer.data import elastic

SHAPE = torch.Size((2, 1, 12, 10, 8))


def test_displacement_and_deformation_equal_those_of_scipy() -> None:
    random = torch.Generator().manual_seed(0)
    views = torch.rand(SHAPE, generator=random)
    noise = elastic.draw_noise(SHAPE, random)

    moved = elastic.displacement(noise, alpha=12.0, sigma=1.5)
    out = elastic.deform(views, moved)

    places = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE[2:]), indexing="ij"))
    for b in range(2):
        shift = [12.0 * ndimage.gaussian_filter(n.numpy(), 1.5, mode="nearest") for n in noise[b]]
        np.testing.assert_allclose(moved[b].numpy(), np.stack(shift), atol=1e-5)
        expected = ndimage.map_coordinates(
            views[b, 0].numpy(), places + np.stack(shift), order=1, mode="nearest"
        )
        np.testing.assert_allclose(out[b, 0].numpy(), expected, atol=1e-4)
    assert (out - views).abs().max() > 0.1


def test_no_displacement_changes_nothing_and_one_voxel_shifts() -> None:
    views = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    still = torch.zeros(2, 3, *SHAPE[2:])
    along_j = still.clone()
    along_j[:, 1] = 1.0

    torch.testing.assert_close(elastic.deform(views, still), views, atol=1e-5, rtol=0)
    shifted = elastic.deform(views, along_j)
    torch.testing.assert_close(shifted[:, :, :, :-1], views[:, :, :, 1:], atol=1e-5, rtol=0)


def test_noise_lies_between_minus_one_and_one_and_differs_between_axes() -> None:
    noise = elastic.draw_noise(SHAPE, torch.Generator().manual_seed(0))

    assert noise.min() >= -1 and noise.max() < 1
    assert not torch.equal(noise[:, 0], noise[:, 1])
