"""Hidden blocks: how many, where, and that the loss sees them alone."""

import torch

from trainer.data import masking

SHAPE = (16, 16, 8)


def random() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def test_every_view_hides_the_same_share_of_other_blocks() -> None:
    mask = masking.draw_mask(6, SHAPE, 4, 0.75, random())

    assert mask.shape == (6, 4, 4, 2)
    assert mask.flatten(1).sum(dim=1).tolist() == [24] * 6
    assert len({tuple(row) for row in mask.flatten(1).tolist()}) == 6


def test_every_block_is_hidden_equally_often() -> None:
    mask = masking.draw_mask(4000, SHAPE, 8, 0.5, random())

    assert (mask.float().mean(dim=0) - 0.5).abs().max() < 0.04


def test_something_is_hidden_and_something_is_seen_whatever_the_ratio() -> None:
    assert masking.num_hidden(4, 0.01) == 1
    assert masking.num_hidden(4, 0.99) == 3
    assert masking.num_hidden(256, 0.75) == 192


def test_a_voxel_is_hidden_with_its_block() -> None:
    mask = masking.draw_mask(2, SHAPE, 4, 0.6, random())

    voxels = masking.of_voxels(mask, 4)

    assert voxels.shape == (2, 1, *SHAPE)
    for b, i, j, k in torch.cartesian_prod(*(torch.arange(n) for n in (2, *SHAPE))).tolist():
        assert voxels[b, 0, i, j, k] == mask[b, i // 4, j // 4, k // 4]


def test_the_error_is_the_mean_over_hidden_voxels_and_blind_to_the_others() -> None:
    hidden = masking.of_voxels(masking.draw_mask(2, SHAPE, 4, 0.5, random()), 4)
    restored, truth = torch.rand(2, 2, 1, *SHAPE, generator=random())

    loss = masking.masked_error(restored, truth, hidden)

    torch.testing.assert_close(loss, ((restored - truth) ** 2)[hidden].mean())
    elsewhere = torch.where(hidden, restored, restored + 5)
    torch.testing.assert_close(masking.masked_error(elsewhere, truth, hidden), loss)
    there = torch.where(hidden, restored + 5, restored)
    assert masking.masked_error(there, truth, hidden) > loss + 1
