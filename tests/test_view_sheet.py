"""The picture of the views: a row for what the configuration uses, tiles where they belong."""

from dataclasses import replace

import numpy as np
import torch
from train_tiny import CONFIG

from histoscale.data.views import ViewsConfig, make_views
from histoscale.eval import view_sheet as sheet

PIXELS = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
SLOTS = torch.tensor([4, 7, 9])


def names(config: ViewsConfig) -> list[str]:
    return [name.split(",")[0].split("\n")[0] for name, _ in sheet._rows(PIXELS, 0, SLOTS, config)]


def test_patches_stand_in_reading_order() -> None:
    patches = np.stack([np.full((3, 2, 2), i, np.uint8) for i in range(5)])
    picture = sheet.patch_sheet(patches, columns=3, gap_px=1)
    assert picture.shape == (5, 8, 3)
    assert [int(picture[y, x, 0]) for y, x in ((0, 0), (0, 3), (0, 6), (3, 0), (3, 3))] == [0, 1, 2, 3, 4]
    assert (picture[2] == 255).all() and (picture[3:, 6:] == 255).all()


def test_only_what_is_used_has_a_row() -> None:
    config = CONFIG.views
    start = ["global crop", "local crop", "flips and turns", "HED jitter", "colour jitter", "blur"]
    views = ["global view 1", "global view 2", "local view 1", "local view 2"]
    assert names(config) == start + views
    bare = replace(config, hed_p=0.0, jitter_p=0.0, local_count=0, blur=replace(config.blur, global_p=[0.0, 0.0]))
    assert names(bare) == ["global crop", "flips and turns", *views[:2]]
    assert names(replace(bare, grey_p=0.1, global_solarize_p=[0.0, 0.2]))[2:4] == ["grey", "solarize"]
    assert names(replace(config, scale_of="view", global_scale=[0.9, 1.1], local_scale=[0.9, 1.1])) == start + views


def test_the_last_rows_are_the_views_of_the_first_step() -> None:
    config = CONFIG.views
    rows = dict(sheet._rows(PIXELS, 5, SLOTS, config))
    made = make_views(PIXELS, 5, 0, SLOTS, config)
    light = (made.globals[3:].permute(0, 2, 3, 1) * torch.tensor(config.std) + torch.tensor(config.mean)) * 255
    np.testing.assert_allclose(rows["global view 2\n32 px"], light, atol=0.51)
    assert rows["local view 1\n16 px"].shape == (3, 16, 16, 3)


def test_each_row_does_one_thing() -> None:
    """Flips and turns keep every grey level; grey has none but grey; the crop of everything is not shown as jittered."""
    config = replace(CONFIG.views, grey_p=0.2)
    rows = {name.split(",")[0].split("\n")[0]: tiles for name, tiles in sheet._rows(PIXELS, 0, SLOTS, config)}
    patches = PIXELS.permute(0, 2, 3, 1).numpy()
    for tile, patch in zip(rows["flips and turns"], patches, strict=True):
        np.testing.assert_array_equal(np.sort(tile.reshape(-1, 3), axis=0), np.sort(patch.reshape(-1, 3), axis=0))
    assert np.ptp(rows["grey"].astype(int), axis=3).max() <= 1 and np.ptp(patches.astype(int), axis=3).max() > 100
    picture = sheet.view_sheet(PIXELS, 0, SLOTS, config)
    assert picture.shape == (12 * 116 - 4, 230 + 3 * 116 - 4, 3) and (picture[112:116] == 255).all()
