"""Stain normalisation: against torchstain, scikit-learn and known stains; what degenerate pixels do; a slide is fitted once."""

import json
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from corners import PIPE, RECIPE, catalog_of, encoder
from PIL import Image
from pydantic import TypeAdapter
from scipy.optimize import nnls
from sklearn.decomposition import dict_learning

from histoscale.data.catalog import Catalog
from histoscale.data.journal import Journal
from histoscale.data.normalise import macenko, reinhard, vahadane
from histoscale.data.normalise import slide as slides
from histoscale.data.normalise.density import NotFitted, Stains, density, stained
from histoscale.data.normalise.sample import read_sample
from histoscale.data.normalise.slide import Methods, NormaliseConfig, SlideNormaliser, fit_slide
from histoscale.data.plan import Plan, SamplerConfig
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.data.visit import SlideSource
from histoscale.eval.embed import embed_slides

TRUE = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
TRUE /= np.linalg.norm(TRUE, axis=1, keepdims=True)
KINDS = ("macenko", "vahadane", "reinhard")


def config(kind: str, **changes: Any) -> Any:
    text = (resources.files("histoscale.configs") / "normalise" / f"{kind}.yaml").read_text()
    return replace(TypeAdapter(NormaliseConfig).validate_python(yaml.safe_load(text)), **changes)


def fitted(pixels: np.ndarray, settings: Methods) -> Any:
    module = {"macenko": macenko, "vahadane": vahadane, "reinhard": reinhard}[settings.kind]
    return module.fit(pixels.reshape(-1, 3), settings)  # type: ignore[attr-defined]


def apply(pixels: np.ndarray, fit: Any, settings: Methods) -> np.ndarray:
    return slides.apply(torch.from_numpy(np.array(pixels)), fit, settings).numpy()


def beer_lambert(amounts: np.ndarray, noise: float = 0.0, level: float = 240.0, seed: int = 0) -> np.ndarray:
    """Pixels of two known stains: I + 1 = level * exp(-amounts @ TRUE)."""
    light = level * np.exp(-amounts @ TRUE) - 1
    return (light + np.random.default_rng(seed).normal(0, noise, light.shape)).round().clip(0, 255).astype(np.uint8)


def mixed(count: int = 40_000, seed: int = 0) -> np.ndarray:
    """Amounts [n, 2]: nuclei, stroma and both, as in tissue."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(3, 0.3, (count, 2))
    pure = rng.integers(0, 3, count)
    amounts[pure == 0, 1] *= 0.02
    amounts[pure == 1, 0] *= 0.02
    return amounts


def angles(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((found * expected).sum(axis=1), -1, 1)))


def pictures(shared: Path) -> list[np.ndarray]:
    names = (
        "torchstain-source.png",
        "torchstain-target.png",
        "tiatoolbox-target.png",
        "histoqc-template1.png",
        "skimage-ihc.png",
    )
    return [np.asarray(Image.open(shared / "tiles/misc" / name).convert("RGB")) for name in names]


# Macenko.


def against_torchstain(image: np.ndarray, settings: Any) -> None:
    from torchstain.numpy.normalizers.macenko import NumpyMacenkoNormalizer

    theirs = NumpyMacenkoNormalizer()
    expected = theirs.normalize(image, stains=False)[0].astype(int)
    found = fitted(image, settings)
    theirs.fit(image)  # its own estimate of the same image
    np.testing.assert_allclose(found.stains, theirs.HERef.T, atol=1e-6)
    np.testing.assert_allclose(found.strengths, theirs.maxCRef, rtol=1e-6)
    ours = apply(image, found, settings).astype(int)
    inside = expected < 250  # its uint8 wraps nothing, but white is cut at another place
    assert np.abs(ours - expected)[inside].max() <= 2  # it leaves out the 1 that was added, and cuts instead of rounding


def test_macenko_equals_torchstain(draw_tissue: Callable[..., np.ndarray]) -> None:
    against_torchstain(draw_tissue(300, 200, whole=True), config("macenko"))


def test_macenko_equals_torchstain_on_real_tiles(shared_data: Path) -> None:
    for image in pictures(shared_data):
        against_torchstain(image, config("macenko"))


@pytest.mark.parametrize("kind, degrees", [("macenko", 3.0), ("vahadane", 7.0)])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_known_stains_are_recovered(kind: str, degrees: float, noise: float) -> None:
    """Vahadane's penalty draws its stains together by a few degrees: that is its optimum (below), not a failure to reach it."""
    found = fitted(beer_lambert(mixed(), noise), config(kind))
    assert (angles(found.stains, TRUE) < degrees).all(), angles(found.stains, TRUE)
    assert found.stains.shape == (2, 3) and np.allclose(np.linalg.norm(found.stains, axis=1), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_scans_of_one_tissue_become_alike(kind: str) -> None:
    """What a method is made for: stains of other strength, or for Reinhard paler and shifted colours."""
    settings, amounts = config(kind), mixed(20_000)
    scans = [beer_lambert(amounts, 1.0), beer_lambert(amounts * (0.7, 1.25), 1.0, seed=1)]
    if kind == "reinhard":
        lab = reinhard.lab_of(torch.from_numpy(scans[0].T.copy()).float())
        paler = reinhard.rgb_of(lab * 0.8 + torch.tensor([[15.0], [-2.0], [3.0]]))
        scans[1] = paler.round().clamp(0, 255).to(torch.uint8).t().numpy()
        settings = replace(settings, light=replace(settings.light, floor=-1.0))  # the paler one has more glass
    after = [apply(scan, fitted(scan, settings), settings).astype(float) for scan in scans]
    before = np.abs(scans[0].astype(float) - scans[1]).mean()
    assert before > 5 and np.abs(after[0] - after[1]).mean() < 0.25 * before


@pytest.mark.parametrize("kind", KINDS)
def test_a_slide_with_the_targets_colours_stays(kind: str) -> None:
    pixels = beer_lambert(mixed(20_000))
    found = fitted(pixels, config(kind))
    target = found if kind == "reinhard" else config(kind).target
    if kind != "reinhard":
        target = replace(target, stains=found.stains.tolist(), strengths=found.strengths.tolist())
    moved = apply(pixels, found, config(kind, target=target))
    if kind == "vahadane":  # colours that its stains can mix; others come to the nearest
        inside = (density(pixels, 240.0) @ np.linalg.pinv(found.stains) >= 0).all(axis=1)
        assert inside.mean() > 0.3
        moved, pixels = moved[inside], pixels[inside]
    assert np.abs(moved.astype(int) - pixels).max() <= 2


# Vahadane.


def problem(noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    found = stained(beer_lambert(mixed(2500), noise), config("vahadane").light)
    return found, macenko.extremes(found, 1)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # of its inner rounds, on the way
def test_vahadane_reaches_the_optimum_of_an_independent_solver() -> None:
    """scikit-learn minimises the same objective by other means, from another start."""
    found, start = problem()
    settings = config("vahadane")
    stains, trace = vahadane.factorise(found, start, settings.sparsity, settings.rounds, settings.tolerance)
    other = np.abs(np.random.default_rng(0).normal(size=(2, 3)))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    _, theirs, errors = dict_learning(
        found, 2, alpha=settings.sparsity, max_iter=400, tol=1e-9, method="cd", positive_dict=True, positive_code=True,
        dict_init=other, code_init=np.ones((len(found), 2)), random_state=0,
    )  # fmt: skip
    assert trace[-1] == pytest.approx(errors[-1] / len(found), rel=1e-4)
    order = np.argsort(-theirs[:, 0])
    assert (angles(stains, theirs[order]) < 0.5).all()


def test_vahadanes_dictionary_keeps_its_constraints_and_the_objective_falls() -> None:
    found, start = problem()
    stains, trace = vahadane.factorise(found, start, 0.1, 300, -1.0)
    assert (stains >= 0).all() and np.allclose(np.linalg.norm(stains, axis=1), 1, atol=1e-9)
    assert len(trace) == 300 and (np.diff(trace) <= 1e-12).all() and trace[-1] < trace[0]
    again, _ = vahadane.factorise(found, start, 0.1, 300, -1.0)
    np.testing.assert_array_equal(stains, again)


@pytest.mark.parametrize("sparsity", [0.0, 0.1])
def test_concentrations_are_the_best_ones(sparsity: float) -> None:
    """Against scipy's active set, one pixel at a time; the penalty is a linear term, folded into the right side."""
    rng = np.random.default_rng(1)
    stains = np.abs(rng.normal(size=(2, 3)))
    found = rng.normal(0.3, 0.6, (300, 3))
    ours = vahadane.concentrations(found, stains, sparsity)
    root = np.linalg.cholesky(stains @ stains.T)  # |root^T h - b|^2 has the same quadratic and linear terms
    for pixel, amounts in zip(found, ours, strict=True):
        best, _ = nnls(root.T, np.linalg.solve(root, stains @ pixel - sparsity))
        np.testing.assert_allclose(amounts, best, atol=1e-8)


def test_vahadanes_picture_is_its_definition() -> None:
    """float32 planes in one pass against float64 pixel by pixel."""
    settings = config("vahadane")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 3), dtype=np.uint8)
    found = Stains(TRUE, np.array([1.5, 0.8]))
    moved = apply(pixels, found, settings)
    target = np.array(settings.target.stains)
    for before, after in zip(pixels, moved, strict=True):
        amounts, _ = nnls(TRUE.T, density(before[None], 240.0)[0])
        light = 240 * np.exp(-(amounts * settings.target.strengths / found.strengths) @ target) - 1
        assert np.abs(light.clip(0, 255) - after).max() <= 0.51


# Reinhard.


def test_reinhard_equals_torchstain(draw_tissue: Callable[..., np.ndarray], shared_data: Path) -> None:
    from torchstain.numpy.normalizers.reinhard import NumpyReinhardNormalizer

    settings = config("reinhard")
    everything = replace(settings, light=replace(settings.light, floor=-1.0))  # it counts every pixel
    drawn = [draw_tissue(200, 150, seed, whole=True) for seed in range(2)]
    for source, target in (drawn, pictures(shared_data)[:2], pictures(shared_data)[3:1:-1]):
        theirs = NumpyReinhardNormalizer()
        theirs.fit(target)
        expected = theirs.normalize(source).astype(int)
        goal = fitted(target, everything)
        np.testing.assert_allclose(goal.mean, theirs.target_means, atol=0.02)
        np.testing.assert_allclose(goal.deviation, theirs.target_stds, atol=0.02)
        ours = apply(source, fitted(source, everything), replace(everything, target=goal)).astype(int)
        assert np.abs(ours - expected).max() <= 2  # its uint8 cuts, ours rounds
        assert np.abs(ours - expected).mean() < 0.75


def test_lab_and_back_is_the_identity() -> None:
    levels = torch.arange(256.0)
    planes = torch.cartesian_prod(levels[::15], levels[::15], levels[::15]).t().contiguous()
    assert (reinhard.rgb_of(reinhard.lab_of(planes)) - planes).abs().max() < 0.02


def test_the_targets_were_fitted_as_the_files_say(shared_data: Path) -> None:
    image = np.asarray(Image.open(shared_data / "tiles/misc/tiatoolbox-target.png").convert("RGB"))
    found, settings = fitted(image, config("reinhard")), config("reinhard")
    np.testing.assert_allclose(found.mean, settings.target.mean, atol=0.01)
    np.testing.assert_allclose(found.deviation, settings.target.deviation, atol=0.01)


# What cannot be fitted.


@pytest.mark.parametrize("kind", KINDS)
def test_glass_and_few_pixels_are_refused(kind: str) -> None:
    for pixels in (np.full((50_000, 3), 243, np.uint8), beer_lambert(mixed(900) + 0.5)):
        with pytest.raises(NotFitted, match="pixels are stained .*: a fit takes 1000"):
            fitted(pixels, config(kind))


@pytest.mark.parametrize("kind", ["macenko", "vahadane"])
def test_one_stain_alone_is_refused(kind: str) -> None:
    amounts = mixed() * [1.0, 0.0]
    for pixels in (beer_lambert(amounts + [0.3, 0.0], 2.0), np.full((5000, 3), 120, np.uint8)):
        with pytest.raises(NotFitted, match="there is only one"):
            fitted(pixels, config(kind))


def test_one_grey_is_refused() -> None:
    with pytest.raises(NotFitted, match="no structure"):
        fitted(np.full((5000, 3), 120, np.uint8), config("reinhard"))


# Slides.


@pytest.fixture
def catalog(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> Catalog:
    """a, b: two stains; c: one grey on glass, which no method can fit."""
    for seed, name in enumerate("ab"):
        make_slide(tmp_path / f"{name}.tif", compression="deflate", kind="generic", seed=seed)
    rows, columns = np.mgrid[0:900, 0:1100]
    inside = ((rows - 450) ** 2 + (columns - 550) ** 2) < 400**2
    flat = np.where(inside[..., None], np.array([180, 100, 150]), 244).astype(np.uint8)
    make_slide(tmp_path / "c.tif", compression="deflate", kind="generic", pixels=flat)
    return catalog_of(tmp_path, store, tissue_config, journal)


def test_a_sample_depends_on_the_slide_alone(catalog: Catalog, store: Store) -> None:
    """Whatever was read before and whoever asks; its pixels are tissue of that slide at the asked magnification."""
    settings = replace(config("macenko").sample, pixels=1 << 30)
    samples = [read_sample(catalog, 0, catalog.reader(0, store), settings) for _ in range(2)]
    np.testing.assert_array_equal(*samples)
    other = read_sample(catalog, 1, catalog.reader(1, store), settings)
    assert samples[0].shape == other.shape == (8 * 256 * 256, 3) and (samples[0] != other).any()
    coarse = read_sample(catalog, 0, catalog.reader(0, store), replace(settings, mpp=2.0, patch_px=64, patches=3))
    assert len(coarse) == 3 * 64 * 64
    few = read_sample(catalog, 0, catalog.reader(0, store), replace(settings, pixels=1000))
    assert 900 < len(few) <= 1000 and set(map(tuple, few)) <= set(map(tuple, samples[0]))
    finer = read_sample(catalog, 0, catalog.reader(0, store), replace(settings, mpp=0.1))  # its finest level, 0.5, serves
    np.testing.assert_array_equal(finer, samples[0])
    with pytest.raises(NotFitted, match="no square of 5000 px"):
        read_sample(catalog, 0, catalog.reader(0, store), replace(settings, patch_px=5000))


@pytest.mark.parametrize("kind", KINDS)
def test_every_patch_of_a_slide_gets_the_same_transform(catalog: Catalog, store: Store, kind: str) -> None:
    """Equal pixels stay equal wherever they are: what a fit by patch breaks."""
    normaliser = SlideNormaliser(catalog, store, config(kind))
    whole = catalog.reader(0, store).region(0, 200, 200, 512, 512)
    parts = whole.reshape(2, 256, 2, 256, 3).transpose(0, 2, 1, 3, 4).reshape(4, 256, 256, 3)
    together = normaliser.apply(whole, 0).reshape(2, 256, 2, 256, 3).transpose(0, 2, 1, 3, 4).reshape(4, 256, 256, 3)
    for part, expected in zip(parts, together, strict=True):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(normaliser)).apply(part[None], 0)[0], expected)
    assert np.abs(together.astype(int) - parts).mean() > 1  # something happens
    alone = fit_slide(catalog, 0, catalog.reader(0, store), config(kind))
    np.testing.assert_array_equal(apply(whole, alone, config(kind)), normaliser.apply(whole, 0))


def test_threads_share_one_fit_and_old_ones_leave(catalog: Catalog, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real, entered = slides.fit_slide, threading.Barrier(2, timeout=20)

    def counted(catalog: Catalog, slide: int, *rest: Any) -> Any:
        calls.append(slide)
        entered.wait()  # passes only when two slides are being fitted at once
        return real(catalog, slide, *rest)

    monkeypatch.setattr(slides, "fit_slide", counted)
    monkeypatch.setattr(slides, "_KEPT", 2)
    normaliser = SlideNormaliser(catalog, store, config("reinhard"))
    pixels = catalog.reader(0, store).region(0, 300, 300, 64, 64)[None]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: normaliser.apply(pixels, i % 2), range(16)))
    assert sorted(calls) == [0, 1]
    for i in range(16):
        np.testing.assert_array_equal(made[i], made[i % 2])
    monkeypatch.setattr(slides, "fit_slide", lambda catalog, slide, *rest: calls.append(slide) or real(catalog, slide, *rest))
    normaliser.apply(pixels, 2)
    normaliser.apply(pixels, 0)  # the oldest had to go
    assert sorted(calls) == [0, 0, 1, 2]


def test_a_slide_that_cannot_be_fitted_passes_as_it_is(catalog: Catalog, store: Store) -> None:
    for kind in KINDS:
        normaliser = SlideNormaliser(catalog, store, config(kind))
        pixels = catalog.reader(2, store).region(0, 400, 400, 64, 64)[None]
        np.testing.assert_array_equal(normaliser.apply(pixels, 2), pixels)
        assert "only one" in (normaliser.reason(2) or "") or "no structure" in (normaliser.reason(2) or "")
        assert normaliser.reason(0) is None


def test_embedding_stores_say_how_their_slides_were_normalised(catalog: Catalog, store: Store, journal: Journal) -> None:
    settings = config("macenko")

    def embed(normalise: Any) -> dict[str, Any]:
        recipe = replace(RECIPE, normalise=normalise)
        found = asdict(embed_slides(encoder(), catalog, [0, 2], recipe, PIPE, store, journal.out, journal))
        return {name: value for name, value in found.items() if not name.endswith("_s")}

    plain = embed(config("none"))
    assert plain["unnormalised"] == {}
    with h5py.File(journal.out / "a.h5") as file:
        before, coords = file["features"][:], file["coords"][:]
        assert json.loads(file.attrs["normalise"]) == {"kind": "none"}
    made = embed(settings)
    assert made["kept"] == 0 and list(made["unnormalised"]) == ["c"] and "only one" in made["unnormalised"]["c"]
    assert embed(settings) == made | {"kept": 2, "patches": 0}  # what was refused is told again
    with h5py.File(journal.out / "a.h5") as file:
        after = file["features"][:]
        assert json.loads(file.attrs["normalise"])["kind"] == "macenko" and file.attrs["unnormalised"] == ""
        np.testing.assert_array_equal(file["coords"][:], coords)
    fit = fit_slide(catalog, 0, catalog.reader(0, store), settings)
    np.testing.assert_array_equal(after, apply(before.astype(np.uint8), fit, settings))  # the encoder shows one pixel a patch
    assert (before != after).any()


def test_a_slide_that_vanishes_is_told(tmp_path: Path, catalog: Catalog, store: Store) -> None:
    (tmp_path / "a.tif").unlink()
    with pytest.raises(OSError, match="a.tif"):
        SlideNormaliser(catalog, store, config("macenko")).apply(np.zeros((1, 8, 8, 3), np.uint8), 0)


def test_training_sees_normalised_patches(catalog: Catalog, store: Store) -> None:
    """The same places as without, every pixel as the slide's own fit moves it; also in a process that got the source pickled."""
    values = yaml.safe_load((resources.files("histoscale.configs") / "sampler" / "default.yaml").read_text())
    sampler = TypeAdapter(SamplerConfig).validate_python(values | {"mpps": [0.5], "weights": [1], "patch_px": 64, "grid": 2})
    plain = SlideSource(catalog, store, sampler)
    moved = SlideSource(catalog, store, sampler, SlideNormaliser(catalog, store, config("macenko")))
    plan = Plan(0, 4, sampler, plain.table())
    for lane in range(4):
        visit = plan.visit(0, lane, 0)
        before, after = plain.read(visit), pickle.loads(pickle.dumps(moved)).read(visit)
        np.testing.assert_array_equal(before.x, after.x)
        reason = moved.normaliser.reason(visit.slide) if moved.normaliser else None
        expected = np.stack(before.pixels)
        if reason is None:
            fit = fit_slide(catalog, visit.slide, catalog.reader(visit.slide, store), config("macenko"))
            expected = apply(expected, fit, config("macenko"))
        np.testing.assert_array_equal(np.stack(after.pixels), expected)
