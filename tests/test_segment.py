"""Decoder probes: they learn what only tokens know, choose inside train, and say the same twice."""

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import mask_fixtures as fixtures
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch import Tensor, nn

from histoscale.data.journal import Journal
from histoscale.eval.array_store import ArrayStore
from histoscale.eval.datasets.consep import open_consep
from histoscale.eval.datasets.masks import LabelledMasks
from histoscale.eval.datasets.monusac import open_monusac
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.encoder import Architecture, Encoder, encoder_of, open_encoder
from histoscale.eval.mask_views import Cutter, Views, random_crops, score_views
from histoscale.eval.results import Score
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.eval.segment import Segmentation, SegmentConfig, run_segmentation
from histoscale.eval.segment_feed import FeedConfig, Material, SegmentError
from histoscale.eval.segment_fit import FitConfig, HonestConfig, assign_folds

INTERVAL = IntervalConfig(draws=60, level=0.95, seed=0)
CONFIG = SegmentConfig(
    protocols=["honest", "eva"],
    fit=FitConfig(
        learning_rate=1e-2, weight_decay=0.01, warm_epochs=1, warm_divisor=3, batch=8, steps=24, runs=2, floor_runs=1, seed=0
    ),
    honest=HonestConfig(folds=3, every=8, patience=3),
    eva_patience={"squares": 3, "monusac": 2, "consep": 2},
    feed=FeedConfig(tokens="fp32", crops=2, piece=5, images_in_memory=4),
    examples=2,
)  # fmt: skip
CELL = 8  # px of a token of the test's encoder


def squares(n: int = 36, side: int = 32, flipped: bool = False) -> LabelledMasks:
    """Images of cells of 8 px whose class stands in four pixels of their middle; a decoder without tokens sees it only near them.

    flipped: the report's labels are exchanged, 1 for 2, on the same pixels.
    """
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, (n, side // CELL, side // CELL))
    pixels = rng.integers(100, 156, (n, 3, side, side)).astype(np.uint8)
    for c, colour in enumerate([(128, 128, 128), (255, 0, 0), (0, 0, 255)]):
        for image, y, x in np.argwhere(kinds == c):
            top, left = y * CELL + 3, x * CELL + 3
            pixels[image, :, top : top + 2, left : left + 2] = np.array(colour, np.uint8)[:, None, None]
    labels = kinds.repeat(CELL, axis=1).repeat(CELL, axis=2)
    roles = np.array(["train"] * (n // 2) + ["report"] * (n - n // 2), dtype="<U8")
    if flipped:
        report = labels[roles == "report"]
        labels[roles == "report"] = np.where(report > 0, 3 - report, 0)
    patients = np.array([f"P{i}" for i in range(n)])
    return LabelledMasks(
        name="squares", classes=("background", "red", "blue"), ignore=None, names=patients, shapes=np.full((n, 2), side),
        roles=roles, patients=patients, groups="patient", blocks=patients, slide_ids=np.full(n, ""), mpp=0.25, tile_px=side,
        hash=f"squares{flipped}", read=lambda row: (pixels[row], labels[row]),
    )  # fmt: skip


def middles(name: str = "middles", side: int = 32, blind: bool = False) -> Encoder:
    """A token of a cell is the colour of its middle; `blind` ones see noise that depends on the place alone."""

    def tokens(pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = pixels.float().unfold(2, CELL, CELL).unfold(3, CELL, CELL)[..., 3:5, 3:5].mean(dim=(4, 5)) / 128 - 1
        found = x.flatten(2).transpose(1, 2)
        if blind:
            found = torch.linspace(-1, 1, found[0].numel()).view(1, *found.shape[1:]).expand(len(found), -1, -1).clone()
        return found.mean(dim=1), found

    device = torch.device("cpu")
    half, model = (0.5,) * 3, nn.Identity()
    return Encoder(name, 3, side, (), None, None, None, half, half, "bicubic", "fp32", name, device, model, tokens)


Run = Callable[..., Segmentation]


@pytest.fixture
def run(tmp_path: Path, journal: Journal) -> Run:
    def called(
        masks: LabelledMasks, config: SegmentConfig = CONFIG, folder: str = "features", untrained: bool = True
    ) -> Segmentation:
        floor = [middles("blind", blind=True)] if untrained else []
        return run_segmentation([middles()], floor, masks, config, INTERVAL, 8, tmp_path / folder, journal)

    return called


def of(scores: list[Score], **wanted: str) -> Score:
    (found,) = [s for s in scores if all(getattr(s, name) == value for name, value in ({"minus": ""} | wanted).items())]
    return found


def test_what_tokens_know_beats_both_floors_in_both_protocols(run: Run) -> None:
    found = run(squares())
    for protocol in ("honest", "eva"):
        mine, random, colour = (
            of(found.scores, encoder=name, protocol=protocol, metric="monai_dice") for name in ("middles", "random", "colour")
        )
        assert mine.interval.value > 0.8 and mine.runs == 2 and mine.spread is not None and not mine.floor
        assert random.floor and colour.floor and random.interval.value < 0.7 and colour.interval.value < 0.7
        assert mine.interval.low is not None and mine.interval.low <= mine.interval.value <= mine.interval.high
        gap = of(found.scores, encoder="middles", protocol=protocol, metric="monai_dice", minus="colour")
        assert gap.interval.value == pytest.approx(mine.interval.value - colour.interval.value)
        assert gap.interval.low is not None and gap.interval.low > 0
    eva, honest = (of(found.scores, encoder="middles", protocol=p, metric="monai_dice").note for p in ("eva", "honest"))
    assert "selected on report, as eva does (3 looks at it)" in eva or "looks at it" in eva
    assert "chosen by 3 folds of train" in honest and "reads of report: 1" in honest
    assert "every token is zero" in of(found.scores, encoder="colour", protocol="honest", metric="dice").note
    names = {s.metric for s in found.scores if s.protocol == "honest"}
    assert names == {"monai_dice", "dice", "iou"}  # no reported image is empty
    classes = [
        of(found.per_class, encoder="middles", protocol="honest", metric=f"dice/{c}") for c in ("background", "red", "blue")
    ]
    pooled = of(found.scores, encoder="middles", protocol="honest", metric="dice")
    assert pooled.interval.value == pytest.approx(np.mean([c.interval.value for c in classes[1:]]))
    assert pooled.effective_mpp == 0.25 and pooled.field_um == 8 and pooled.groups == "patient"
    assert len(found.examples) == 4 and all(
        e.predicted.shape == (32, 32) and e.pixels.shape == (3, 32, 32) for e in found.examples
    )
    shown = [e for e in found.examples if e.protocol == "honest"]
    assert np.mean([(e.predicted == e.truth).mean() for e in shown]) > 0.8


def test_reported_labels_choose_nothing_in_the_honest_protocol(run: Run) -> None:
    honest = replace(CONFIG, protocols=["honest"], examples=18)
    first, second = run(squares(), honest, "a"), run(squares(flipped=True), honest, "b")
    assert first.fits == second.fits and len(first.fits) == 4  # steps and hashes of weights
    for one, other in zip(first.examples, second.examples, strict=True):
        np.testing.assert_array_equal(one.predicted, other.predicted)
    drop = [of(f.scores, encoder="middles", metric="dice").interval.value for f in (first, second)]
    assert drop[0] - drop[1] > 0.5


def test_reported_labels_do_choose_in_evas(run: Run) -> None:
    """The counterpart: the test above can fail."""
    eva = replace(CONFIG, protocols=["eva"])
    first, second = run(squares(), eva, "a", False), run(squares(flipped=True), eva, "b", False)
    assert [f.steps for f in first.fits if f.encoder == "middles"] != [f.steps for f in second.fits if f.encoder == "middles"]


def test_the_same_seed_says_the_same_with_or_without_what_is_on_disk(run: Run, tmp_path: Path) -> None:
    short = replace(CONFIG, fit=replace(CONFIG.fit, steps=9, runs=1), honest=HonestConfig(3, 3, 2))
    first, again = run(squares(), short, "a"), run(squares(), short, "a")
    files = sorted((tmp_path / "a").rglob("*.npy"))
    files[0].unlink()  # a piece that a killed run never wrote
    files[-1].write_bytes(files[-1].read_bytes()[:200])  # one that a failing disk cut short
    mended = run(squares(), short, "a")
    fresh = run(squares(), replace(short, feed=replace(CONFIG.feed, tokens="recompute", piece=7)), "c")
    other = run(squares(), replace(short, fit=replace(short.fit, seed=1)), "a")
    assert first.fits == again.fits == mended.fits == fresh.fits != other.fits
    assert repr(first.scores) == repr(again.scores) == repr(mended.scores) == repr(fresh.scores)


def test_fp16_tokens_take_half_and_are_refused_where_they_overflow(run: Run, tmp_path: Path, journal: Journal) -> None:
    halves = replace(CONFIG, protocols=["honest"], feed=replace(CONFIG.feed, tokens="fp16"))
    found = run(squares(), halves, untrained=False)
    exact = run(squares(), replace(CONFIG, protocols=["honest"]), untrained=False)
    values = [of(f.scores, encoder="middles", metric="dice").interval.value for f in (found, exact)]
    assert values[0] == pytest.approx(values[1], abs=0.05)
    sizes = {
        kind: sum(f.stat().st_size - 128 for f in tmp_path.glob(f"features/tokens-middles-{kind}-*/*"))
        for kind in ("fp16", "fp32")
    }
    assert sizes["fp32"] == 2 * sizes["fp16"] == 36 * 16 * 3 * 4
    hot = middles("hot")
    loud = replace(hot, tokens=lambda pixels: tuple(x * 1e6 for x in hot.tokens(pixels)))  # type: ignore[arg-type]
    with pytest.raises(SegmentError, match="which fp16 cannot hold: set segment.feed.tokens=fp32"):
        run_segmentation([loud], [], squares(), halves, INTERVAL, 8, tmp_path / "hot", journal)


def test_evas_fit_ends_by_its_patience_and_only_sees_whole_epochs(run: Run) -> None:
    eva = replace(CONFIG, protocols=["eva"], fit=replace(CONFIG.fit, steps=50, runs=1), eva_patience={"squares": 50})
    found = run(squares(), eva, untrained=False)
    note = of(found.scores, encoder="middles", metric="monai_dice").note
    assert "(16 looks at it)" in note  # 18 images are 3 steps an epoch; the last 2 of 50 steps are no epoch
    short = run(squares(), replace(eva, eva_patience={"squares": 1}), untrained=False)
    looks = int(of(short.scores, encoder="colour", metric="monai_dice").note.split("(")[1].split()[0])
    assert looks < 16
    with pytest.raises(SegmentError, match="2 steps are less than an epoch of 3"):
        run(squares(), replace(eva, fit=replace(eva.fit, steps=2)), untrained=False)


def test_a_real_network_on_monusac_with_its_ambiguous_zones(tmp_path: Path, journal: Journal) -> None:
    fixtures.write_monusac(tmp_path / "data", train=4, test=3)
    masks = open_monusac(tmp_path / "data", fixtures.MONUSAC)
    architecture = Architecture(
        "timm", "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        32, (0.5,) * 3, (0.5,) * 3, "bicubic", (), None, None, None,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = encoder_of(architecture.build(), architecture, "tiny", torch.device("cpu"), "fp32")
    small = replace(CONFIG, fit=replace(CONFIG.fit, steps=4, runs=1), honest=HonestConfig(3, 2, 2))
    kept = run_segmentation([encoder], [], masks, small, INTERVAL, 8, tmp_path / "features", journal)
    honest = of(kept.scores, encoder="tiny", protocol="honest", metric="monai_dice")
    assert honest.interval.low is None and "3 patients" in honest.interval.note and "2 crops an image, drawn once" in honest.note
    eva = of(kept.scores, encoder="tiny", protocol="eva", metric="monai_dice")
    assert "a defect of eva 0.4.5" in eva.note and "defect" not in honest.note
    assert honest.effective_mpp == pytest.approx(0.25 * 60 / 32)
    fresh = replace(small, feed=replace(small.feed, crops=None))
    first, again = (run_segmentation([encoder], [], masks, fresh, INTERVAL, 8, tmp_path / "f", journal) for _ in range(2))
    assert first.fits == again.fits != kept.fits
    assert "crops" not in of(first.scores, encoder="tiny", protocol="honest", metric="dice").note
    # The first two epochs of fresh crops are the crops that are kept.
    one, two = (Material(masks, 32, 0, c.feed, 8, tmp_path / "m", journal) for c in (small, fresh))
    for epoch in (0, 1):
        pair = [m.feeds(encoder, torch.device("cpu"), False)[0](np.array([2, 0]), epoch) for m in (one, two)]
        torch.testing.assert_close(pair[0].tokens, pair[1].tokens, atol=1e-5, rtol=1e-5)
        assert torch.equal(pair[0].labels, pair[1].labels) and torch.equal(pair[0].rgb, pair[1].rgb)


def test_on_consep_images_are_drawn_and_the_interval_says_images(tmp_path: Path, journal: Journal) -> None:
    fixtures.write_consep(tmp_path / "data", train=3, test=10)
    masks = open_consep(tmp_path / "data", fixtures.CONSEP)
    small = replace(CONFIG, fit=replace(CONFIG.fit, steps=2, runs=1), honest=HonestConfig(3, 2, 1))
    found = run_segmentation([middles()], [], masks, small, INTERVAL, 8, tmp_path / "features", journal)
    score = of(found.scores, encoder="middles", protocol="honest", metric="dice")
    assert score.groups == "image" and score.interval.note.startswith("warning: 10 images, t-interval on image-level")
    assert score.effective_mpp == pytest.approx(0.25 * 250 / 32) and score.field_um == pytest.approx(62.5)
    assert "the set names no patients" in score.note and "a part of the set" in score.note


def test_tiles_go_column_by_column_without_overlap() -> None:
    masks = replace(squares(2), shapes=np.array([[70, 100], [32, 40]]), tile_px=32)
    views = score_views(masks)
    assert views.images.tolist() == [0] * 6 + [1]
    assert views.boxes[:, :2].tolist() == [[0, 0], [0, 32], [32, 0], [32, 32], [64, 0], [64, 32], [0, 0]]
    whole = score_views(replace(masks, tile_px=None))
    assert whole.boxes.tolist() == [[0, 0, 100, 70], [0, 0, 40, 32]] and not whole.stretch


def test_labels_are_resized_by_the_nearest_pixel_after_the_cut(tmp_path: Path) -> None:
    masks = replace(squares(2), read=lambda row: (np.zeros((3, 8, 12), np.uint8), np.tile(np.arange(12) // 4, (8, 1))))
    views = Views(np.array([0, 0]), np.array([[4, 0, 8, 8], [0, 0, 12, 8]]), stretch=False)
    _, labels = Cutter(masks, 1).cut(views, np.array([0, 1]), 4)
    assert labels[0, 0].tolist() == [1, 1, 2, 2]
    assert labels[1, 0].tolist() == [0, 1, 1, 2]  # the middle of the resized image, 6 wide: 0 0 1 1 2 2 without its ends
    with pytest.raises(DatasetError, match=r"image P0: a mask \(8, 12\) with the labels \[7\]"):
        Cutter(replace(masks, read=lambda row: (np.zeros((3, 8, 12), np.uint8), np.full((8, 12), 7))), 1).cut(
            views, np.array([0]), 4
        )


def test_crops_are_torchvisions_distribution_and_a_function_of_their_key() -> None:
    shapes = np.array([[300, 500]] * 400 + [[20, 2000], [2000, 20]])
    rows = np.arange(len(shapes))
    views = random_crops(shapes, rows, 3, 0)
    np.testing.assert_array_equal(random_crops(shapes, rows[::-1].copy(), 3, 0).boxes[::-1], views.boxes)
    assert (random_crops(shapes, rows, 4, 0).boxes != views.boxes).any() and (
        random_crops(shapes, rows, 3, 1).boxes != views.boxes
    ).any()
    left, top, width, height = views.boxes.T
    assert (
        (left >= 0).all() and (top >= 0).all() and (left + width <= shapes[:, 1]).all() and (top + height <= shapes[:, 0]).all()
    )
    area, ratio = (width * height / 150_000)[:400], (width / height)[:400]
    assert 0.078 < area.min() < 0.12 and 0.72 < area.max() <= 0.8  # the largest 4 to 3 in 300 x 500
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.03)
    torch.manual_seed(0)
    from torchvision.transforms.v2 import RandomResizedCrop

    theirs = [RandomResizedCrop(224).make_params([torch.zeros(3, 300, 500)]) for _ in range(400)]
    other = np.array([p["width"] * p["height"] for p in theirs]) / 150_000
    assert area.mean() == pytest.approx(other.mean(), abs=0.06) and area.std() == pytest.approx(other.std(), abs=0.04)
    assert views.boxes[-2].tolist()[2:] == [round(20 * 4 / 3), 20]  # far too wide: the middle of an allowed ratio


def test_folds_keep_blocks_whole_and_even() -> None:
    blocks = np.repeat([f"b{i}" for i in range(10)], [1, 1, 1, 1, 1, 2, 2, 3, 4, 8])
    fold_of = assign_folds(blocks, 3, 0)
    sizes = [sum(fold_of[b] == f for b in blocks.tolist()) for f in range(3)]
    assert sum(sizes) == 24 and max(sizes) - min(sizes) <= 1
    assert assign_folds(blocks, 3, 0) == fold_of and set(assign_folds(np.array(["a", "b"]), 3, 0).values()) == {0, 1}
    with pytest.raises(SegmentError, match="at least two"):
        assign_folds(np.array(["a", "a"]), 3, 0)


def test_what_cannot_be_is_said(run: Run, tmp_path: Path, journal: Journal, store: object) -> None:
    masks = squares(6)
    for change, match in [
        ({"protocols": ["fair"]}, r"segment.protocols is \['fair'\]: expected some of honest, eva"),
        ({"eva_patience": {"consep": 9}}, "expected epochs for squares too; set segment.eva_patience.squares="),
        ({"feed": replace(CONFIG.feed, tokens="fp8")}, "segment.feed.tokens is 'fp8'"),
        ({"feed": replace(CONFIG.feed, crops=0)}, "segment.feed.crops is 0"),
    ]:
        with pytest.raises(SegmentError, match=match):
            run(masks, replace(CONFIG, **change))
    with pytest.raises(SegmentError, match="colour is a floor"):
        run_segmentation([open_encoder("colour", store)], [], masks, CONFIG, INTERVAL, 8, tmp_path, journal)  # type: ignore[arg-type]
    empty = replace(masks, read=lambda row: (masks.read(row)[0], np.zeros((32, 32), np.int64)), hash="empty")
    with pytest.raises(SegmentError, match="no training image holds a pixel of foreground"):
        run(empty, replace(CONFIG, protocols=["honest"]))
    wild = replace(CONFIG, fit=replace(CONFIG.fit, learning_rate=float("inf")), protocols=["honest"])
    with pytest.raises(SegmentError, match="the loss of fold 0 is nan at step 8: lower segment.fit.learning_rate"):
        run(squares(), wild)
    with pytest.raises(FileNotFoundError, match="fill the store again"):
        ArrayStore(tmp_path / "none", 4, 2)[np.array([3])]


def test_the_shipped_configuration_is_evas_table() -> None:
    text = resources.files("histoscale.configs").joinpath("segment/default.yaml").read_text()
    config = TypeAdapter(SegmentConfig).validate_python(OmegaConf.to_container(OmegaConf.create(text)))
    fit = config.fit
    assert (fit.learning_rate, fit.weight_decay, fit.warm_epochs, fit.warm_divisor) == (2e-3, 0.01, 5, 3)
    assert (fit.batch, fit.steps, fit.runs, config.eva_patience) == (64, 2000, 5, {"consep": 200, "monusac": 100})
    assert config.honest.folds == 3
