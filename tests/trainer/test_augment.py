"""Views against NumPy and SciPy, and against their own randomness."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from models.recipe import CropPairs
from trainer.data import affine, augment, filters
from trainer.data.banded import Banded
from trainer.data.resident import Resident
from trainer.data.sampling import Pairs
from trainer.randomness import generator

RECIPE = CropPairs(input_size=(16, 16, 16), crop_sizes=((16, 16, 16),))


def random_batch(batch: int, n: int = 16) -> torch.Tensor:
    return torch.rand(batch, 1, n, n, n, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 2.0, 6.0])
def test_the_blur_matrix_equals_scipys_filter(sigma: float) -> None:
    signal = np.random.default_rng(0).random(12)

    matrix = filters.blur_matrix(12, torch.tensor([sigma], dtype=torch.float64))[0]

    expected = ndimage.gaussian_filter1d(signal, sigma, mode="nearest") if sigma else signal
    np.testing.assert_allclose(matrix.numpy() @ signal, expected, atol=1e-7)


@pytest.mark.parametrize(("num_in", "num_out"), [(96, 64), (112, 64), (32, 64), (64, 64), (33, 16)])
def test_the_resize_matrix_equals_filter_and_interpolation(num_in: int, num_out: int) -> None:
    signal = np.random.default_rng(0).random(num_in)
    scale = num_in / num_out
    sigma = max(0.0, (scale - 1) / 2)
    smooth = ndimage.gaussian_filter1d(signal, sigma, mode="nearest") if sigma else signal
    expected = np.interp((np.arange(num_out) + 0.5) * scale - 0.5, np.arange(num_in), smooth)

    actual = filters.resize_matrix(num_in, num_out).numpy() @ signal

    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_matrices_along_the_axes_equal_a_3d_gaussian() -> None:
    volume = np.random.default_rng(0).random((2, 8, 9, 10)).astype(np.float32)
    sigma = torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.0, 1.0]])
    matrices = [filters.blur_matrix(n, sigma[:, a]) for a, n in enumerate((8, 9, 10))]

    actual = filters.along_axes(torch.from_numpy(volume), matrices).numpy()

    for b in range(2):
        expected = ndimage.gaussian_filter(volume[b], sigma[b].tolist(), mode="nearest")
        np.testing.assert_allclose(actual[b], expected, atol=1e-5)


@pytest.mark.parametrize("extents", [(112, 112, 56), (96, 96, 96), (70, 66, 40), (64, 64, 32)])
def test_resizing_equals_a_dense_product_with_each_axis(extents: tuple[int, int, int]) -> None:
    crops = torch.from_numpy(np.random.default_rng(0).random((2, *extents))).half()
    size = (64, 64, 32)

    actual = augment.resize(crops, size, flip_k=torch.tensor([False, True]))

    dense = [filters.resize_matrix(*along).double() for along in zip(extents, size, strict=True)]
    expected = crops.double()
    for matrix in dense:  # each takes the foremost of three axes to the end
        expected = torch.tensordot(expected, matrix, dims=([1], [1]))
    expected[1] = expected[1].flip(2)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("painting", [augment.NONE, augment.INPAINT, augment.OUTPAINT])
def test_painting_box_by_box_is_painting_by_shares(painting: int) -> None:
    random = torch.Generator().manual_seed(2)
    drawn = augment.draw_corruption(RECIPE, torch.tensor([painting]), random)
    view, noise = random_batch(2)[:, 0]
    share = augment.noise_share(drawn, view.shape)[0]

    painted = augment.paint_boxes(*(x.permute(2, 0, 1).clone() for x in (view, noise)), drawn)

    assert torch.equal(painted.permute(1, 2, 0), torch.lerp(view, noise, share))


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.9, 2.0, 6.0])
def test_what_a_filter_reads_is_its_matrix_along_every_axis(sigma: float) -> None:
    volume = torch.from_numpy(np.random.default_rng(0).random((12, 14, 16))).float()
    whole = [filters.blur_matrix(n, torch.tensor([sigma]).double())[0] for n in volume.shape]

    wider = torch.tensor([[sigma] * 3, [7.0] * 3])
    (first, middle, last), _ = augment.blur_taps(volume.shape, wider)
    once = middle.along(first.along(volume, 0), 1)

    expected = torch.einsum("ai,bj,ck,ijk->abc", *whole, volume.double()).float()
    torch.testing.assert_close(last.along_last(once), expected)
    torch.testing.assert_close(last.last_to_first(once), expected.permute(2, 0, 1))


@pytest.mark.parametrize(("num_in", "num_out"), [(112, 72), (56, 40), (33, 16), (32, 72), (7, 9)])
def test_a_matrix_cut_into_blocks_is_the_whole_and_a_narrower_band_is_not(num_in, num_out) -> None:
    matrix = filters.resize_matrix(num_in, num_out)
    first = (matrix != 0).int().argmax(dim=1).tolist()
    end = (num_in - (matrix != 0).flip(1).int().argmax(dim=1)).tolist()
    lines = torch.from_numpy(np.random.default_rng(0).random((20, 2 * num_in))).float()[:, ::2]
    # Every other line of a larger memory, with room around, of which nothing else is written.
    room = torch.full((40, num_out + 6), 7.0)

    Banded.cut(matrix, first, end).of_lines(lines, out=room[::2, 3:-3])
    turned = Banded.cut(matrix, first, end).of_lines_turned(lines)

    expected = lines @ matrix.T
    torch.testing.assert_close(room[::2, 3:-3], expected)
    torch.testing.assert_close(turned, expected.T)
    assert (room[1::2] == 7).all() and (room[:, :3] == 7).all() and (room[:, -3:] == 7).all()
    if num_in > num_out:
        narrow = Banded.cut(matrix, first, [column - 1 for column in end])
        assert not torch.allclose(narrow.of_lines_turned(lines), expected.T, atol=1e-4)


def test_a_rotation_equals_scipys_and_no_angle_changes_nothing() -> None:
    x = torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(0).random((16, 16, 4)), 2))
    x = torch.stack([x, x]).float()

    turned = augment.rotate_in_plane(x, torch.tensor([0.0, float(np.deg2rad(10.0))]))

    torch.testing.assert_close(turned[0], x[0], atol=1e-5, rtol=0)
    both = [
        ndimage.rotate(x[1].numpy(), degrees, axes=(0, 1), reshape=False, order=1)
        for degrees in (10, -10)
    ]
    inner = (slice(4, 12), slice(4, 12))
    errors = [np.abs(turned[1].numpy()[inner] - other[inner]).max() for other in both]
    assert min(errors) < 1e-3 < max(errors)


def indicator(flips: tuple[int, int, int], turns: int) -> torch.Tensor:
    code = torch.zeros(7)
    code[:3] = torch.tensor(flips)
    code[3 + turns] = 1
    return code


def test_an_indicator_is_what_numpys_flip_and_rot90_do() -> None:
    codes, expected = [], []
    x = random_batch(1, 8)
    for bits in range(8):
        for turns in range(4):
            flips = (bits & 1, bits >> 1 & 1, bits >> 2 & 1)
            codes.append(indicator(flips, turns))
            axes = [axis for axis, flip in enumerate(flips) if flip]
            expected.append(np.rot90(np.flip(x[0, 0].numpy(), axes), turns, axes=(0, 1)))

    actual = augment.apply_indicators(x.expand(32, -1, -1, -1, -1), torch.stack(codes))

    np.testing.assert_array_equal(actual[:, 0].numpy(), np.stack(expected))
    seen: dict[bytes, int] = {}
    for volume in actual:
        seen[volume.numpy().tobytes()] = seen.get(volume.numpy().tobytes(), 0) + 1
    assert len(seen) == 16 and set(seen.values()) == {2}
    turned_first = [
        np.flip(np.rot90(x[0, 0].numpy(), turns, axes=(0, 1)), 0)
        for turns, flips in [(int(c[3:].argmax()), c[:3].tolist()) for c in codes]
        if flips == [1, 0, 0]
    ]
    flipped_first = [e for e, c in zip(expected, codes, strict=True) if c[:3].tolist() == [1, 0, 0]]
    assert not np.array_equal(turned_first, flipped_first)  # so the order of the two is checked


def test_drawn_indicators_hold_exactly_one_quarter_turn() -> None:
    codes = augment.draw_indicators(400, generator(0, 1, "indicators"))

    assert (codes[:, 3:].sum(dim=1) == 1).all()
    assert 0.4 < float(codes[:, :3].mean()) < 0.6
    assert (codes[:, 3:].sum(dim=0) > 60).all()


def test_painting_keeps_its_promises_and_leaves_the_clean_view_alone() -> None:
    clean = random_batch(3)
    before = clean.clone()
    kinds = torch.tensor([augment.NONE, augment.INPAINT, augment.OUTPAINT])
    drawn = augment.draw_corruption(RECIPE, kinds, generator(0, 1, "painting"))
    sharp = augment.Corruption(kinds, drawn.box_start, drawn.box_size, torch.zeros(3, 3))

    painted = augment.corrupt(clean, sharp, generator(0, 1, "noise"))

    inside = augment.inside_boxes(drawn, clean.shape[2:])[:, None]
    same = torch.isclose(painted, clean, atol=1e-6)
    assert same[0].all()
    assert torch.equal(~same[1], inside[1]) and inside[1].any()
    assert torch.equal(same[2], inside[2]) and inside[2].any() and not inside[2].all()
    assert not inside[1:, :, :3].any() and not inside[1:, :, -3:].any()  # three from the border
    assert torch.equal(clean, before)


def test_views_spoiled_in_place_are_the_same_and_others_stay() -> None:
    views = random_batch(6, 12)
    painting = torch.full((6,), augment.OUTPAINT)
    drawn = augment.draw_corruption(RECIPE, painting, generator(0, 1, "painting"))
    kept = views.clone()

    def spoil(clean: torch.Tensor, *, in_place: bool) -> torch.Tensor:
        return augment.corrupt(clean, drawn, generator(0, 1, "noise"), in_place=in_place)

    fresh = spoil(views, in_place=False)
    assert torch.equal(views, kept)
    written = spoil(views, in_place=True)
    assert written is views and torch.equal(written, fresh)
    assert not torch.equal(views, kept)


def test_boxes_have_the_sizes_of_the_paper() -> None:
    recipe = CropPairs()
    kinds = torch.tensor([augment.INPAINT] * 300 + [augment.OUTPAINT] * 300)

    drawn = augment.draw_corruption(recipe, kinds, generator(0, 1, "painting"))

    for half, (low, high) in (
        (slice(0, 300), ((10, 5), (21, 10))),
        (slice(300, 600), ((28, 14), (37, 19))),
    ):
        there = drawn.box_size[half][drawn.box_size[half][..., 0] > 0]
        assert (int(there[:, 0].min()), int(there[:, 2].min())) == low
        assert (int(there[:, 0].max()), int(there[:, 2].max())) == high
    assert (drawn.box_size[300:, 0] > 0).all()


def back_of(angles: np.ndarray, scales: np.ndarray, order: str = "xyz") -> np.ndarray:
    """From output to input offsets, the content scaled first, then turned; by SciPy's angles."""
    turn = Rotation.from_euler(order, angles if order == "xyz" else angles[::-1]).as_matrix()
    return np.diag(1 / scales) @ turn.T


ANGLES, SCALES = np.deg2rad([8.0, -6.0, 10.0]), np.array([1.1, -0.95, 0.9])


def turned(x: np.ndarray, angles: np.ndarray = ANGLES, scales: np.ndarray = SCALES) -> np.ndarray:
    """What `rotate_and_scale` makes of one view."""
    drawn = (torch.tensor(each, dtype=torch.float32)[None] for each in (angles, scales))
    return affine.rotate_and_scale(torch.from_numpy(x)[None], *drawn)[0].numpy()


def test_turns_about_all_axes_move_coordinates_as_scipys_matrices_do() -> None:
    """Of a linear image both interpolations are exact, so it shows where each voxel is read."""
    shape = (20, 22, 12)
    offsets = np.stack(np.indices(shape), axis=-1) - (np.array(shape) - 1) / 2
    inner = (slice(5, -5), slice(5, -5), slice(4, -4))
    for axis in range(3):
        image = offsets[..., axis].astype(np.float32)

        moved = turned(image)

        expected = offsets @ back_of(ANGLES, SCALES)[axis]
        np.testing.assert_allclose(moved[inner], expected[inner], atol=2e-5)
        other = offsets @ back_of(ANGLES, SCALES, "zyx")[axis]
        assert np.abs(moved - other)[inner].max() > 0.01  # so the order of turns is checked


def test_turns_about_all_axes_equal_two_passes_of_scipys_interpolation() -> None:
    """Along K at the coordinate that keeps I and J, then in each slice; also outside the view."""
    x = np.random.default_rng(0).random((18, 20, 12)).astype(np.float32)
    back, centre = back_of(ANGLES, SCALES), (np.array(x.shape) - 1) / 2

    moved = turned(x)

    padded = np.pad(x - x.min(), 1)  # SciPy cuts to 0 at the edge voxels; ours runs out beyond
    out = np.indices(x.shape) - centre[:, None, None, None]
    first = np.empty_like(x)
    for i, j, k in np.ndindex(x.shape):
        want_i, want_j, p_k = np.array([i, j, k]) - centre
        p_ij = np.linalg.solve(back[:2, :2], [want_i, want_j] - back[:2, 2] * p_k)
        at = back[2] @ [*p_ij, p_k] + centre[2]
        first[i, j, k] = np.interp(at + 1, np.arange(14), padded[i + 1, j + 1])
    at_i, at_j, _ = np.tensordot(back, out, 1) + centre[:, None, None, None]
    expected = np.stack(
        [
            ndimage.map_coordinates(
                np.pad(first[..., k], 1), [at_i[..., k] + 1, at_j[..., k] + 1], order=1
            )
            for k in range(x.shape[2])
        ],
        axis=-1,
    )
    np.testing.assert_allclose(moved, expected + x.min(), atol=2e-5)
    assert (expected == 0).any()  # so what comes in from outside is checked
    assert np.abs(turned(x, -ANGLES) - moved).max() > 0.1


def test_turns_about_all_axes_are_near_trilinear_interpolation() -> None:
    """Linear interpolation is off by at most an eighth of the second derivative on each axis.

    Trilinear interpolation and ours are each within the sum over three axes of the image; so they
    are within twice that of each other. The first pass along K and the second add up as they do.
    """
    x = ndimage.gaussian_filter(np.random.default_rng(0).random((20, 20, 12)), 2)
    x = x.astype(np.float32)
    back, centre = back_of(ANGLES, SCALES), (np.array(x.shape) - 1) / 2

    moved = turned(x)

    trilinear = ndimage.affine_transform(
        x, back, centre - back @ centre, order=1, cval=float(x.min())
    )
    bend = sum(np.abs(np.diff(x, 2, axis=axis)).max() for axis in range(3)) / 8
    inner = (slice(4, 16), slice(4, 16), slice(3, 9))
    apart = np.abs(moved - trilinear)[inner]
    assert 0 < apart.max() < 2 * bend
    assert np.abs(turned(x, -ANGLES) - trilinear)[inner].max() > 2 * bend
    assert moved.min() >= x.min() - 1e-6


def test_a_turn_about_k_alone_is_the_one_in_the_plane_with_its_flips() -> None:
    x = random_batch(3, 12)[:, 0]
    angle = torch.tensor([0.1, -0.17, 0.0])
    flips = torch.tensor([[False, True], [True, False], [False, False]])
    zero, one = torch.zeros(3), torch.ones(3)
    signs = torch.stack([*torch.where(flips.T, -1.0, 1.0), one], dim=1)

    in_plane = augment.rotate_in_plane(x, angle, flips)
    about_k = affine.rotate_and_scale(x, torch.stack([zero, zero, angle], dim=1), signs)

    torch.testing.assert_close(about_k, in_plane, atol=1e-5, rtol=0)
    assert not torch.allclose(augment.rotate_in_plane(x, -angle, flips), in_plane, atol=1e-2)


def test_a_blurred_view_is_the_same_in_whatever_batch() -> None:
    views = random_batch(6, 12)
    drawn = augment.draw_corruption(
        RECIPE, torch.full((6,), augment.NONE), generator(0, 1, "boxes")
    )

    together = augment.corrupt(views, drawn, generator(0, 1, "noise"))

    for at in range(6):
        part = slice(at, at + 1)
        alone = augment.corrupt(views[part], drawn.part(part), generator(0, 1, "noise"), skip=at)
        assert torch.equal(together[part], alone)
    other = augment.corrupt(views[:1], drawn.part(slice(1, 2)), generator(0, 1, "noise"))
    assert not torch.equal(other, together[:1])


def test_geometry_stays_within_what_the_recipe_allows() -> None:
    def draw(**fields: object) -> augment.Geometry:
        recipe = CropPairs.model_validate({**RECIPE.model_dump(), **fields})
        return augment.draw_geometry(recipe, 500, generator(0, 1, "geometry"))

    paper = draw()
    official = draw(flip_axes=("i",), rotation="all", max_scaling=0.1)

    limit = np.deg2rad(10.0)
    assert (paper.flips.float().mean(dim=0) > 0.4).all()
    assert not paper.angles[:, :2].any() and (paper.scales == 1).all()
    assert 0.95 * limit < float(paper.angles[:, 2].abs().max()) <= limit
    assert not official.flips[:, 1:].any() and torch.equal(official.flips[:, 0], paper.flips[:, 0])
    assert (official.angles.abs().amax(dim=0) > 0.95 * limit).all()
    assert 0.9 <= float(official.scales.min()) < 0.91 and 1.09 < float(official.scales.max()) <= 1.1


@pytest.mark.parametrize("flip_axes", [(), ("i",), ("i", "j", "k")])
@pytest.mark.parametrize("rotation", ["in_plane", "all"])
def test_unturned_clean_views_are_the_crops_flipped(flip_axes, rotation) -> None:
    """And both boxes of a pair may have sizes of their own."""
    sizes = ((16, 16, 16), (24, 24, 16))
    recipe = CropPairs(
        input_size=(16, 16, 16), crop_sizes=sizes, flip_axes=flip_axes, rotation=rotation,
        flip_probability=1.0, max_rotation_deg=0.0, max_scaling=0.0,
    )  # fmt: skip
    volume = np.random.default_rng(0).random((32, 30, 20)).astype(np.float16)
    resident = Resident.of([volume], fill=[0], at_least=(24, 24, 16), device=torch.device("cpu"))
    start = torch.tensor([[[3, 5, 2], [4, 1, 0]], [[0, 2, 1], [7, 6, 4]]])
    pairs = Pairs(torch.tensor([0, 0]), torch.tensor([[0, 1], [1, 0]]), start)
    geometry = augment.draw_geometry(recipe, 2, generator(0, 1, "geometry"))

    views = [augment.make_clean(resident, recipe, pairs, view, geometry) for view in (0, 1)]

    axes = ["ijk".index(axis) for axis in flip_axes]
    for b in (0, 1):
        for view in (0, 1):
            extent = sizes[int(pairs.size[b, view])]
            i, j, k = start[b, view].tolist()
            crop = torch.from_numpy(
                volume[i : i + extent[0], j : j + extent[1], k : k + extent[2]].astype(np.float32)
            )
            matrices = [filters.resize_matrix(n, 16) for n in extent]
            expected = torch.einsum("ai,bj,ck,ijk->abc", *matrices, crop).flip(axes)
            torch.testing.assert_close(views[view][b, 0], expected, atol=1e-5, rtol=0)


def test_generators_follow_from_seed_step_and_purpose() -> None:
    def draw(seed: int, step: int, purpose: str) -> float:
        return float(torch.rand((), generator=generator(seed, step, purpose)))

    assert draw(3, 5, "pairs") == draw(3, 5, "pairs")
    assert (
        len({draw(3, 5, "pairs"), draw(3, 6, "pairs"), draw(4, 5, "pairs"), draw(3, 5, "mix")}) == 4
    )
