from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from imaging import preview
from imaging.volume import Volume


def picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def corner_volume(corner):
    voxels = np.full((20, 20, 20), -1000, dtype=np.int16)
    labels = np.zeros(voxels.shape, dtype=np.uint8)
    block = tuple(slice(12, 18) if high else slice(2, 8) for high in corner)
    labels[block] = 1
    return Volume(voxels, np.eye(4)), labels


@pytest.mark.parametrize(
    ("corner", "panel", "at"),
    [
        ((1, 0, 0), 0, (3, 1)),  # right: left in the axial picture, posterior: low
        ((0, 1, 0), 0, (1, 3)),
        ((1, 0, 1), 1, (1, 1)),  # right and superior: upper left in the coronal picture
        ((0, 0, 0), 1, (3, 3)),
        ((0, 1, 1), 2, (1, 1)),  # anterior and superior: upper left in the sagittal picture
        ((0, 0, 0), 2, (3, 3)),
    ],
)
def test_the_mask_is_drawn_where_a_radiologist_expects_it(tmp_path, corner, panel, at):
    volume, labels = corner_volume(corner)

    preview.overlay_png(volume, labels, tmp_path / "p.png", height=80)

    shown = picture(tmp_path / "p.png")[:, panel * 88 : panel * 88 + 80]
    is_green = (shown[..., 1] > 60) & (shown[..., 0] < 60)
    row, column = np.argwhere(is_green).mean(axis=0)
    assert (row < 40, column < 40) == (at[0] < 2, at[1] < 2)


def test_thick_slices_are_shown_in_true_proportion_and_an_empty_mask_too(tmp_path):
    volume = Volume(np.zeros((30, 30, 10), np.int16), np.diag([1.0, 1.0, 6.0, 1.0]))

    preview.overlay_png(volume, np.zeros(volume.shape, np.uint8), tmp_path / "p.png", height=60)

    assert picture(tmp_path / "p.png").shape == (60, 60 + 30 + 30 + 2 * 8, 3)


def test_a_mask_of_another_shape_is_refused(tmp_path):
    volume = Volume(np.zeros((4, 4, 4), np.int16), np.eye(4))

    with pytest.raises(ValueError, match="labels are"):
        preview.overlay_png(volume, np.zeros((4, 4, 5), np.uint8), tmp_path / "p.png")
