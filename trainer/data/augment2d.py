"""Views of 2D images: the numbers are drawn first, then applied to the whole batch on the device.

A clean view is crop, anti-aliased resize and flip (one matrix an axis), then rotation. The
corrupted view is the clean one painted over outside a few windows, turned grey, blurred, changed in
colour, normalised, and cut out: zeros after the normalisation, as in the official code. Departures
from its torchvision transforms (algorithms.md 1.2, row 34): rotation interpolates between pixels
and comes after the flip, which changes no distribution, and the four changes of colour come in one
random order a batch.

B batch, C channels (1 grey, 3 colours), S rows and columns of the stored square, n of the view,
N windows or holes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.recipe import ImageCrops, ImageViews, Normalisation
from trainer.data import augment, filters
from trainer.data.images2d import ResidentImages, as_channels
from trainer.data.to_device import to_device

_TRIES = 10
"""Crops drawn at once; the first that fits is taken, else the whole image (torchvision)."""


@dataclass(frozen=True, slots=True)
class Geometry2d:
    """How clean views are made.

    Attributes:
        start: First row and column of each crop, (B, 2).
        extent: Its rows and columns, (B, 2).
        flip: Whether left and right change places, bool (B,).
        angle: Of the rotation in radians, (B,).
    """

    start: Tensor
    extent: Tensor
    flip: Tensor
    angle: Tensor


@dataclass(frozen=True, slots=True)
class Corruption2d:
    """How clean views are spoiled.

    Attributes:
        outpainted: Whether there is noise outside the windows, bool (B,).
        window_start: First pixel of each window that is kept, (B, N, 2).
        window_size: Its extent, (B, N, 2); 0 where the window is not there.
        hole_start: First pixel of each hole, (B, N, 2); may lie outside.
        hole_size: Its extent, (B, N, 2); 0 where the hole is not there.
        is_grey: Whether colours are taken away, bool (B,).
        blur_sigma: Deviation in pixels, (B,); 0 for none.
        brightness: Factor, (B,).
        contrast: Factor about the mean luminance, (B,).
        saturation: Factor about the luminance, (B,).
        hue: Turn, (B,).
        order: In which the last four are applied, indices into that list, (4,).
    """

    outpainted: Tensor
    window_start: Tensor
    window_size: Tensor
    hole_start: Tensor
    hole_size: Tensor
    is_grey: Tensor
    blur_sigma: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor

    def of(self, rows: Tensor) -> Corruption2d:
        """The same for some samples of the batch, whose colours change in one order."""
        of_samples = [f.name for f in dataclasses.fields(self) if f.name != "order"]
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in of_samples})


def draw_geometry(
    views: ImageCrops, side: int, batch_size: int, random: torch.Generator
) -> Geometry2d:
    """Crops of random area and ratio, a flip, a rotation.

        for each image, ten times:
            area = S^2 * uniform(crop_area); ratio = exp(uniform(log of crop_ratio))
            rows, columns = round(sqrt(area / ratio)), round(sqrt(area * ratio))
            take it, at a uniform place, if it fits

    Args:
        views: Recipe.
        side: Of the stored squares, S.
        batch_size: B.
        random: Of the host.
    """
    shape = (batch_size, _TRIES)
    area = side**2 * _uniform(shape, *views.crop_area, random)
    low, high = views.crop_ratio
    ratio = _uniform(shape, math.log(low), math.log(high), random).exp()
    tried = torch.stack([area / ratio, area * ratio], dim=2).sqrt().round().long()  # (B, tries, 2)
    fits = ((tried >= 1) & (tried <= side)).all(dim=2)
    first = fits.int().argmax(dim=1)
    drawn = tried[torch.arange(batch_size), first]
    extent = torch.where(fits.any(dim=1, keepdim=True), drawn, side)
    place = torch.rand(batch_size, 2, generator=random, dtype=torch.float64)
    flip = torch.rand(batch_size, generator=random) < views.flip_probability
    turn = _uniform((batch_size,), -1.0, 1.0, random).float()
    return Geometry2d(
        start=(place * (side - extent + 1)).long(),
        extent=extent,
        flip=flip,
        angle=turn * math.radians(views.max_rotation_deg),
    )


def draw_outpainting(views: ImageViews, batch_size: int, random: torch.Generator) -> Tensor:
    """Which images are painted outside and not cut out, the same for both views, bool (B,)."""
    return torch.rand(batch_size, generator=random) < views.outpaint_probability


def draw_corruption(views: ImageViews, outpainted: Tensor, random: torch.Generator) -> Corruption2d:
    """Windows or holes, blur and colours of one view.

    A hole is a square about a uniform pixel, so it may hang over the border (Cutout).
    """
    batch_size, n = len(outpainted), views.input_size
    painting = torch.where(outpainted, augment.OUTPAINT, augment.NONE)
    window_start, window_size = augment.draw_boxes((n, n), painting, random)
    centre = torch.randint(n, (batch_size, views.cutout_holes, 2), generator=random)
    hole_size = torch.full_like(centre, views.cutout_size)
    is_blurred = torch.rand(batch_size, generator=random) < views.blur_probability
    sigma = _uniform((batch_size,), *views.blur_sigma, random).float()

    def factor(change: float) -> Tensor:
        return _uniform((batch_size,), 1.0 - change, 1.0 + change, random).float()

    return Corruption2d(
        outpainted=outpainted,
        window_start=window_start,
        window_size=window_size,
        hole_start=centre - views.cutout_size // 2,
        hole_size=hole_size * ~outpainted[:, None, None],
        is_grey=torch.rand(batch_size, generator=random) < views.grayscale_probability,
        blur_sigma=sigma * is_blurred,
        brightness=factor(views.brightness),
        contrast=factor(views.contrast),
        saturation=factor(views.saturation),
        hue=_uniform((batch_size,), -views.hue, views.hue, random).float(),
        order=torch.randperm(4, generator=random),
    )


def make_clean(
    images: ResidentImages, views: ImageCrops, index: Tensor, geometry: Geometry2d
) -> Tensor:
    """Cut, resize, flip and rotate, float32 (B, C, n, n) in [0, 1].

    What a rotation brings in from outside is each crop's minimum.
    """
    whole = images.take(index)  # (B, C, S, S)
    side, device = whole.shape[-1], whole.device
    start, extent = to_device(geometry.start, device), to_device(geometry.extent, device)
    along_rows, along_columns = (
        crop_matrix(start[:, axis], extent[:, axis], side, views.input_size) for axis in (0, 1)
    )
    flip = to_device(geometry.flip, device)[:, None, None]
    along_columns = torch.where(flip, along_columns.flip(1), along_columns)
    upright = _along_both(whole, along_rows, along_columns)
    turned = augment.rotate_in_plane(upright.movedim(1, -1), to_device(geometry.angle, device))
    return turned.movedim(-1, 1)


def crop_matrix(start: Tensor, extent: Tensor, num_in: int, num_out: int) -> Tensor:
    """Crop and anti-aliased linear resize along an axis, (B, num_out, num_in).

    Equals cutting the crop out and Pillow's `resize` with BILINEAR:

        for each output o, with scale = extent / num_out:
            centre = start + (o + 0.5) * scale
            weight of input p in the crop = max(0, 1 - |p + 0.5 - centre| / max(scale, 1))
            divide by the sum of the weights

    Args:
        start: First input of each crop, (B,).
        extent: Its length, (B,).
        num_in: Inputs along the axis.
        num_out: Outputs.
    """
    scale = (extent.float() / num_out)[:, None, None]  # (B, 1, 1)
    output = torch.arange(num_out, device=start.device)[None, :, None]
    position = torch.arange(num_in, device=start.device)[None, None, :]
    # Counted from the start of the crop, where float32 is exact enough.
    within = position - start[:, None, None]
    distance = (within + 0.5 - (output + 0.5) * scale).abs()
    weight = (1 - distance / scale.clamp(min=1.0)).clamp(min=0.0)
    weight = weight * ((within >= 0) & (within < extent[:, None, None]))
    return weight / weight.sum(dim=2, keepdim=True)


def corrupt(
    clean: Tensor,
    corruption: Corruption2d,
    normalisation: Normalisation | None,
    random: torch.Generator,
    *,
    skip: int = 0,
) -> Tensor:
    """The network's input, float32 (B, 3, n, n).

    Args:
        clean: (B, C, n, n) in [0, 1]; not changed.
        corruption: What was drawn.
        normalisation: As in the recipe.
        random: Of the noise, on the views' device.
        skip: Views whose noise is drawn and dropped first: those of lower ranks.
    """
    device = clean.device
    torch.rand((skip, *clean.shape[1:]), generator=random, device=device)
    noise = torch.rand(clean.shape, generator=random, device=device)
    outpainted = to_device(corruption.outpainted, device)[:, None, None, None]
    kept = _inside(corruption.window_start, corruption.window_size, clean)
    x = torch.where(outpainted & ~kept, noise, clean)
    is_grey = to_device(corruption.is_grey, device)[:, None, None, None]
    x = torch.where(is_grey, luminance(x), x)
    blur = filters.blur_matrix(clean.shape[-1], to_device(corruption.blur_sigma, device))
    x = change_colours(_along_both(x, blur, blur), corruption)
    holes = _inside(corruption.hole_start, corruption.hole_size, clean)
    return as_channels(x, normalisation) * ~holes


def change_colours(x: Tensor, corruption: Corruption2d) -> Tensor:
    """Brightness, contrast, saturation and hue in the drawn order, clipped after each."""
    changes = [
        (_brighten, corruption.brightness),
        (_stretch, corruption.contrast),
        (_saturate, corruption.saturation),
        (turn_hue, corruption.hue),
    ]
    for place in corruption.order.tolist():
        change, by = changes[place]
        x = change(x, to_device(by, x.device)[:, None, None, None]).clamp(0.0, 1.0)
    return x


def luminance(x: Tensor) -> Tensor:
    """(B, 1, n, n) of colours; a grey image is its own."""
    if x.shape[1] == 1:
        return x
    from imaging.dicom2d import LUMINANCE  # here, as its module wants pydicom (`images2d`)

    weights = to_device(torch.tensor(LUMINANCE), x.device)
    return (x * weights[:, None, None]).sum(dim=1, keepdim=True)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add to the hue (in turns) of colours (B, 3, n, n) in [0, 1]; grey has none.

    By way of hue, saturation and value, as `colorsys` defines them.
    """
    if x.shape[1] == 1:
        return x
    value, least = x.amax(dim=1), x.amin(dim=1)  # (B, n, n)
    chroma = value - least
    safe = torch.where(chroma > 0, chroma, 1.0)
    red, green, blue = x.unbind(dim=1)
    sixth = torch.where(
        red == value,
        (green - blue) / safe,
        torch.where(green == value, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sixth + 6 * turn[:, 0]

    def channel(offset: int) -> Tensor:
        k = (offset + turned) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0.0, 1.0)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


def _brighten(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def _stretch(x: Tensor, factor: Tensor) -> Tensor:
    mean = luminance(x).mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * factor


def _saturate(x: Tensor, factor: Tensor) -> Tensor:
    grey = luminance(x)
    return grey + (x - grey) * factor


def _inside(start: Tensor, size: Tensor, like: Tensor) -> Tensor:
    """Pixels in at least one box, bool (B, 1, n, n)."""
    start, size = to_device(start, like.device), to_device(size, like.device)
    rows, columns = augment.intervals(start, size, like.shape[2:])
    return (torch.einsum("bnr,bnc->brc", rows, columns) > 0)[:, None]


def _along_both(x: Tensor, along_rows: Tensor, along_columns: Tensor) -> Tensor:
    """Apply a matrix (B, m, n) along each axis of (B, C, n, n)."""
    return along_rows[:, None] @ x @ along_columns.mT[:, None]


def _uniform(shape: tuple[int, ...], low: float, high: float, random: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)
