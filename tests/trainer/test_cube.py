"""Turning sub-volumes and slabs equals numpy's rot90 in slow loops, and can be undone."""

import numpy as np
import pytest
import torch

from trainer.data import cube
from trainer.data.cube import Slabs

SHAPE = (8, 8, 4)
SIDE = 2


def views(count: int = 2) -> torch.Tensor:
    return torch.arange(count * 8 * 8 * 4, dtype=torch.float32).reshape(count, 1, *SHAPE)


def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_the_24_rotations_are_distinct_and_are_what_quarter_turns_generate() -> None:
    numbers = np.arange(27).reshape(3, 3, 3)
    reached = {numbers.tobytes()}
    border = [numbers]
    while border:
        at = border.pop()
        for plane in ((0, 1), (0, 2), (1, 2)):
            turned = np.ascontiguousarray(np.rot90(at, 1, plane))
            if turned.tobytes() not in reached:
                reached.add(turned.tobytes())
                border.append(turned)

    table = cube.rotation_table(3)

    assert {row.numpy().reshape(3, 3, 3).tobytes() for row in table} == reached
    assert len(reached) == cube.NUM_ROTATIONS
    assert torch.equal(table[0], torch.arange(27))


def test_every_sub_volume_is_turned_in_its_own_place() -> None:
    before = views()
    rotation = cube.draw_rotations(2, SHAPE, SIDE, random())

    after = cube.turn_subvolumes(before, rotation, SIDE)

    for b in range(2):
        n = 0
        for i in range(0, 8, SIDE):
            for j in range(0, 8, SIDE):
                for k in range(0, 4, SIDE):
                    box = (slice(i, i + SIDE), slice(j, j + SIDE), slice(k, k + SIDE))
                    order, flips = cube.rotations()[int(rotation[b, n])]
                    expected = np.flip(before[b, 0][box].numpy().transpose(order), flips)
                    np.testing.assert_array_equal(after[b, 0][box].numpy(), expected)
                    n += 1
        assert n == rotation.shape[1]
    assert not torch.equal(after, before)


def test_no_rotation_changes_nothing() -> None:
    assert torch.equal(cube.turn_subvolumes(views(), torch.zeros(2, 32).long(), SIDE), views())


def test_slabs_are_turned_axis_after_axis_as_a_loop_of_rot90_does() -> None:
    slabs = cube.draw_slabs(2, SHAPE, SIDE, random())

    after = cube.turn_slabs(views(), slabs, SIDE)

    for b in range(2):
        expected = views()[b, 0].numpy().copy()
        for axis, turns in enumerate((slabs.about_i, slabs.about_j, slabs.about_k)):
            for at in range(expected.shape[axis] // SIDE):
                slab = [slice(None)] * 3
                slab[axis] = slice(at * SIDE, (at + 1) * SIDE)
                plane = tuple(a for a in range(3) if a != axis)
                turned = np.rot90(expected[tuple(slab)], int(turns[b, at]), plane)
                expected[tuple(slab)] = turned.copy()
        np.testing.assert_array_equal(after[b, 0].numpy(), expected)
    assert not torch.equal(after, views())


def test_slabs_whose_plane_is_not_square_turn_by_halves_alone() -> None:
    slabs = cube.draw_slabs(200, SHAPE, SIDE, random())

    assert set(slabs.about_k.unique().tolist()) == {0, 1, 2, 3}
    for turns in (slabs.about_i, slabs.about_j):
        assert set(turns.unique().tolist()) == {0, 2}


@pytest.mark.parametrize("turn", [1, 3])
def test_a_turn_of_a_slab_and_its_opposite_change_nothing(turn: int) -> None:
    def only(k: int) -> Slabs:
        none = torch.zeros(2, 4).long()
        return Slabs(none, none, torch.tensor([[k, 0]]).repeat(2, 1))

    turned = cube.turn_slabs(views(), only(turn), SIDE)

    assert not torch.equal(turned, views())
    assert torch.equal(cube.turn_slabs(turned, only(4 - turn), SIDE), views())
