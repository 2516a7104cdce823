"""What is asked of the sampler and what comes out of the stream: magnifications behind a filter, continuous ones, warnings."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.memory import StreamConfig
from histoscale.data.pixelfilter import PixelFilterConfig
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.storage import Store
from histoscale.data.stream import Batch, Stream
from histoscale.data.tissue import TissueConfig
from histoscale.data.visit import SlideSource

ROOT = Path(__file__).resolve().parents[1]
G = 24


@pytest.fixture
def catalog(
    tmp_path: Path, make_slide: Callable[..., Path], draw_tissue: Callable[..., np.ndarray], store: Store,
    tissue_config: TissueConfig, journal: Journal,
) -> Catalog:  # fmt: skip
    """Four slides of 0.25 um/px with levels 1, 2 and 4, of two sites."""
    rows = ["slide_id,uri,patient_id,site"]
    for number, name in enumerate("abcd"):
        pixels = draw_tissue(1000, 800, seed=number, whole=True)
        path = make_slide(tmp_path / f"{name}.svs", pixels=pixels, tile=128, downsamples=(1, 2, 4), mpp=0.25)
        rows.append(f"{name},{path},p{number},{'north' if number < 2 else 'south'}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    slides = read_manifest(str(tmp_path / "manifest.csv"), store)
    return build_catalog(slides, store, tissue_config, tmp_path / "catalog", 0, None, journal)


@pytest.fixture
def sampler() -> SamplerConfig:
    values = yaml.safe_load((ROOT / "configs/sampler/default.yaml").read_text())
    values |= {"mpps": [0.25, 0.5, 1.0], "weights": [1, 2, 1], "patch_px": 32, "grid": 2, "lanes_per_slot": 2}
    values["pixel_filter"] = PixelFilterConfig(**values["pixel_filter"])
    return SamplerConfig(**values)


def reading(workers: int) -> StreamConfig:
    values = yaml.safe_load((ROOT / "configs/stream/default.yaml").read_text())
    return StreamConfig(**{**values, "workers": workers, "prefetch": 1})


def streamed(source: SlideSource, steps: int, world: int = 1, workers: int = 0, start: int = 0) -> tuple[list[Batch], list[str]]:
    """Batches of all ranks in their order, and the warnings of the first."""
    plan = Plan(5, G, source.sampler, source.table())
    streams = [Stream(plan, source, reading(workers), rank, world, start) for rank in range(world)]
    try:
        found = [next(stream) for _ in range(steps) for stream in streams]
        return found, streams[0].tally.warnings()
    finally:
        for stream in streams:
            stream.close()


def test_the_mix_is_the_requested_one_whatever_the_filter_refuses(catalog: Catalog, store: Store, sampler: SamplerConfig) -> None:
    """A filter for patches with almost no purple refuses few small fields of view and most large ones: the targets are met."""
    picky = PixelFilterConfig("hsv", [145, 180], [8, 255], [150, 255], 0.93, 1)
    source = SlideSource(catalog, store, replace(sampler, pixel_filter=picky))
    plan = Plan(5, G, source.sampler, source.table())
    served: Counter[int] = Counter()
    with Stream(plan, source, reading(0)) as stream:
        for _ in range(40):
            served.update(next(stream).target.tolist())
        accepted = stream.tally.acceptance()["mpp"]
        warnings = stream.tally.warnings()
    assert accepted["0.25"] > 2 * accepted["1"] and accepted["1"] < 0.5, accepted  # it refuses unevenly
    shares = np.array([served[target] for target in range(3)]) / served.total()
    visits = served.total() / 4
    for share, wanted in zip(shares, (0.25, 0.5, 0.25), strict=True):
        assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / visits)
    assert [text for text in warnings if "of mpp" in text] == [
        f"the pixel filter accepts only {share:.0%} of the patches of mpp {name}"
        for name, share in accepted.items()
        if share < 0.5
    ]


def test_warnings_name_the_magnification_the_site_and_the_slide(catalog: Catalog, store: Store, sampler: SamplerConfig) -> None:
    source = SlideSource(catalog, store, replace(sampler, magnification="log_uniform", weights=[1, 1]))
    plan = Plan(5, G, source.sampler, source.table())
    stream = Stream(plan, source, reading(0))
    tally = stream.tally
    tally.counts[tally.TESTED] = 100
    tally.counts[tally.PASSED] = 80
    assert tally.warnings() == []
    tally.counts[tally.PASSED, :, 1] = 10
    tally.counts[tally.PASSED, 3] = 5
    tally.counts[tally.PASSED, 0, 1] = tally.counts[tally.PASSED, 1, 1] = 70
    told = tally.warnings()
    assert [text.split(" of ")[-1] for text in told] == ["mpp 0.5-1", "site south", "slide c", "slide d"]


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_continuous_magnification_comes_out_log_uniform(
    catalog: Catalog, store: Store, sampler: SamplerConfig, tolerance: float
) -> None:
    """Realised um/px of the visits, as recorded with the pixels. Within the tolerance a stored level takes over."""
    continuous = replace(sampler, magnification="log_uniform", mpps=[0.25, 0.5, 1.0], weights=[1, 1], mpp_tolerance=tolerance)
    source = SlideSource(catalog, store, continuous)
    assert source.table().eligible.all()
    plan = Plan(5, G, continuous, source.table())
    batches, _ = streamed(source, 32)
    realised, wanted = [], []
    for batch in batches:
        for slot, mpp in zip(batch.slots.tolist(), batch.mpp.tolist(), strict=True):
            place = plan.place(batch.step, slot)
            realised.append(mpp)
            wanted.append(plan.visit(slot, place.lane, place.turn).mpp)
    real, asked = np.array(realised), np.array(wanted)
    assert np.abs(real / asked - 1).max() <= tolerance + 1e-6
    every = np.unique(asked)  # one value a visit
    assert stats.kstest(np.log(every / 0.25) / np.log(4), "uniform").pvalue > 1e-3
    if tolerance == 0:
        assert stats.kstest(np.log(np.unique(real) / 0.25) / np.log(4), "uniform").pvalue > 1e-3
    else:
        at_levels = np.isin(np.round(real, 6), [0.25, 0.5, 1.0])
        assert 0 < at_levels.mean() < 0.3 and (np.abs(real[~at_levels] / asked[~at_levels] - 1) < 1e-6).all()


def test_continuous_patches_do_not_depend_on_ranks_workers_or_the_start(
    catalog: Catalog, store: Store, sampler: SamplerConfig
) -> None:
    source = SlideSource(catalog, store, replace(sampler, magnification="log_uniform", mpps=[0.25, 1.0], weights=[1]))

    def listed(world: int, workers: int, start: int, steps: int) -> list[tuple[object, ...]]:
        found = []
        for batch in streamed(source, steps, world, workers, start)[0]:
            columns = (batch.slots, batch.slide, batch.mpp, batch.level, batch.x, batch.y)
            rows = zip(*(column.tolist() for column in columns), strict=True)
            found += [(batch.step, *row, patch.numpy().tobytes()) for row, patch in zip(rows, batch.pixels, strict=True)]
        return found

    whole = listed(1, 0, 0, 6)
    assert listed(2, 2, 0, 6) == whole and listed(3, 0, 3, 3) == whole[3 * G :]


def test_a_slide_serves_a_range_only_from_end_to_end(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, sampler: SamplerConfig, tissue_config: TissueConfig,
    journal: Journal,
) -> None:  # fmt: skip
    """Of 0.5 um/px: 0.25-0.5 would enlarge it, 0.5-1 is within, at 8 um/px not one patch fits on it."""
    path = make_slide(tmp_path / "a.svs", mpp=0.5)
    (tmp_path / "m.csv").write_text(f"slide_id,uri\na,{path}\n")
    catalog = build_catalog(read_manifest(str(tmp_path / "m.csv"), store), store, tissue_config, tmp_path / "c", 0, None, journal)
    source = SlideSource(
        catalog, store, replace(sampler, magnification="log_uniform", mpps=[0.25, 0.5, 1.0, 20.0], weights=[1, 1, 1])
    )
    assert source.table().eligible.tolist() == [[False, True, False]]
