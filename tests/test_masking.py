"""Block masks: exact counts, keyed by step and slot within groups, blocks rather than dust."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from histoscale.data.keys import keys
from histoscale.pretrain.masking import MaskConfig, block_masks, counts, make_masks

CONFIG = MaskConfig(probability=0.5, ratio=[0.1, 0.5], shift=False)
GRID = (14, 14)


@pytest.mark.parametrize("shift", [False, True])
def test_counts_are_exact_and_weights_are_their_inverse(shift: bool) -> None:
    masks = make_masks(replace(CONFIG, shift=shift), 0, 3, torch.arange(64), GRID, 2, 64)
    per_crop = masks.crops.sum(1)
    assert sorted(per_crop[per_crop > 0].tolist()) == counts(CONFIG, 128, 196)
    assert len(masks.indices) == per_crop.sum() == 3771  # for B = 64 and P = 196, constant (facebookresearch/dinov3)
    assert masks.crops.flatten()[masks.indices].all()
    assert torch.allclose(masks.weights, 1 / per_crop[masks.indices // 196].float())
    assert masks.weights.sum().round() == 64  # one for every masked crop


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (14, 14), (7, 10)])
def test_every_count_is_reached(grid: tuple[int, int]) -> None:
    patches = grid[0] * grid[1]
    wanted = np.arange(200) % (patches // 2 + 1)
    masks = block_masks(keys(1, "test", 0, torch.arange(200)), wanted, grid, False)
    assert masks.shape == (200, patches) and (masks.sum(1) == wanted).all()


def test_ranks_and_micro_batches_change_nothing() -> None:
    """Any whole groups of slots get the same masks, in any company."""
    slots = torch.arange(48)
    whole = make_masks(CONFIG, 5, 9, slots, GRID, 2, 8).crops.view(2, 48, -1)
    for start, stop in ((0, 24), (24, 48), (16, 24)):
        part = make_masks(CONFIG, 5, 9, slots[start:stop], GRID, 2, 8).crops.view(2, stop - start, -1)
        assert torch.equal(part, whole[:, start:stop])
    assert not torch.equal(make_masks(CONFIG, 5, 10, slots, GRID, 2, 8).crops, whole.flatten(0, 1))
    assert not torch.equal(make_masks(CONFIG, 6, 9, slots, GRID, 2, 8).crops, whole.flatten(0, 1))


def test_number_of_masked_patches_never_changes() -> None:
    assert len({len(make_masks(CONFIG, 0, step, torch.arange(16), (6, 6), 2, 8).indices) for step in range(50)}) == 1


def test_its_value_for_a_grid_of_16() -> None:
    assert sum(counts(CONFIG, 128, 256)) == 4941  # B = 64 (facebookresearch/dinov3)


def test_a_shift_rolls_masks_and_evens_out_where_they_lie() -> None:
    """Blocks favour the middle of the grid; rolled around its edges they favour no place, and remain the same blocks."""
    named, wanted = keys(3, "test", 0, torch.arange(4000)), np.full(4000, 40)
    still, rolled = (block_masks(named, wanted, GRID, shift).reshape(-1, *GRID) for shift in (False, True))
    for before, after in zip(still[:50], rolled[:50], strict=True):
        moves = [(i, j) for i in range(14) for j in range(14) if (np.roll(before, (i, j), (0, 1)) == after).all()]
        assert len(moves) == 1
    expected = 40 / 196
    scatter = (expected * (1 - expected) / 4000) ** 0.5
    assert np.abs(rolled.mean(0) - expected).max() < 5 * scatter
    assert np.abs(still.mean(0) - expected).max() > 10 * scatter and still.mean(0)[7, 7] > still.mean(0)[0, 0]


def test_block_sizes_and_aspects_follow_beit() -> None:
    """Against a plain loop over the definition with numpy's generator: where masks lie, and how long their borders are."""
    one = block_masks(keys(4, "test", 0, torch.arange(3000)), np.full(3000, 98), GRID, False).reshape(-1, *GRID)
    generator, plain = np.random.default_rng(0), np.zeros((3000, 14, 14), bool)
    for mask in plain:
        failures = 0
        while mask.sum() < 98 and failures < 10:
            left = 98 - mask.sum()
            area = 4 + generator.uniform() * (min(left, 98) - 4)
            aspect = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            failures += 1
            if h < 14 and w < 14:
                i, j = generator.integers(0, 15 - h), generator.integers(0, 15 - w)
                new = h * w - mask[i : i + h, j : j + w].sum()
                if 0 < new <= left:
                    mask[i : i + h, j : j + w] = True
                    failures = 0
        free = np.argwhere(~mask)
        for i, j in free[generator.permutation(len(free))[: 98 - mask.sum()]]:
            mask[i, j] = True
    assert np.abs(one.mean(0) - plain.mean(0)).max() < 5 * (0.25 * 2 / 3000) ** 0.5
    for axis in (1, 2):
        ours, theirs = (np.abs(np.diff(masks.astype(int), axis=axis)).sum((1, 2)) for masks in (one, plain))
        assert abs(ours.mean() - theirs.mean()) < 5 * (ours.var() / 3000 + theirs.var() / 3000) ** 0.5


def test_which_crop_is_masked_and_how_much_is_uniform() -> None:
    sizes = torch.stack([make_masks(CONFIG, 0, s, torch.arange(8), GRID, 2, 8).crops.sum(1) for s in range(400)]).float()
    often = (sizes > 0).float().mean(0)
    assert (often - 0.5).abs().max() < 4 * (0.25 / 400) ** 0.5
    mean = np.mean(counts(CONFIG, 16, 196)) / 2
    assert (sizes.mean(0) - mean).abs().max() < 4 * sizes.std() / 20


def test_masks_are_blocks() -> None:
    """Masked patches have more masked neighbours than scattered ones of the same count would."""
    wanted = np.full(300, 60)
    masks = block_masks(keys(2, "test", 0, torch.arange(300)), wanted, GRID, False).reshape(-1, *GRID)
    together = (masks[:, 1:] & masks[:, :-1]).mean() / masks.mean()
    assert together > 1.7 * 60 / 196


def test_errors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="12 slots .* method.group=8"):
        make_masks(CONFIG, 0, 0, torch.arange(12), GRID, 2, 8)
    with pytest.raises(ValueError, match="mask no patch"):
        make_masks(MaskConfig(0.1, [0.1, 0.2], False), 0, 0, torch.arange(2), GRID, 2, 2)
