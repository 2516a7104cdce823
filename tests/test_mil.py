"""Slide models: invariances of the aggregators, folds by patient, splits that leak nothing, training that repeats to the bit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histoscale.data.journal import Progress
from histoscale.data.manifest import Slide
from histoscale.data.splits import SplitError
from histoscale.eval.mil.bags import BagError, Bags, Features, SplitConfig, TaskConfig, read_bags
from histoscale.eval.mil.ensemble import AggregatorConfig, Ensemble, SlideModel, build_aggregator, load_ensemble
from histoscale.eval.mil.fit import FitConfig, Fitted, fit, grouped_folds, pad

KINDS = ("abmil", "mean", "max")
TASK = TaskConfig(
    name="t",
    label="tumour",
    positive=["1"],
    negative=["0"],
    sensitivities=[0.95, 0.8],
    rule="conformal",
    prevalence=0.1,
    decision="slide",
)
SPLIT = SplitConfig(
    unit="patient", role="role", train=["train"], internal=["test"], external=["external"], external_sites=[], test=0.25, seed=0
)


def aggregator(kind: str) -> AggregatorConfig:
    return AggregatorConfig(kind=kind, hidden=16, attention=8, dropout=0.25)


def fit_config(kind: str) -> FitConfig:
    return FitConfig(
        aggregator=aggregator(kind), folds=3, repeats=2, epochs=15, batch=8, tiles=60, lr=1e-2, weight_decay=1e-2, seed=0
    )


def quiet() -> Progress:
    return Progress(1, "fit", "epochs", "off", 10)


def slide(name: str, patient: str | None, site: str | None, **labels: str) -> Slide:
    return Slide(name, f"{name}.svs", patient, site, None, None, None, None, None, None, None, labels)


def write_store(folder: Path, name: str, features: np.ndarray, encoder: str = "abc") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    side = 64
    coords = np.stack([np.arange(len(features)) % 8 * side, np.arange(len(features)) // 8 * side], 1)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["features"], file["coords"] = features.astype(np.float32), coords
        file.attrs.update(encoder_hash=encoder, mpp=0.5, patch_size=32, patch_size_level0=side, slide_id=name)


def cohort(folder: Path, patients: int = 48, width: int = 12) -> list[Slide]:
    """Two slides a patient; positives hold a few tiles that are shifted in one direction, whose sites differ in another."""
    rng = np.random.default_rng(5)
    slides = []
    for patient in range(patients):
        role = ("train", "train", "test", "external")[patient % 4]
        site = "out" if role == "external" else f"site{patient % 3}"
        for number in range(2):
            name, label = f"s{patient}-{number}", int((patient // 4 + number) % 2)
            features = rng.normal(size=(int(rng.integers(30, 80)), width))
            features[:, 1] += 2 * (site == "out")
            features[: 3 * label, 0] += 6
            write_store(folder, name, features[rng.permutation(len(features))])
            slides.append(slide(name, f"p{patient}", site, tumour=str(label), role=role))
    return slides


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bags, Features]:
    folder = tmp_path_factory.mktemp("stores")
    bags = read_bags(folder, cohort(folder), TASK, SPLIT)
    return bags, Features(bags, 1 << 30)


# --- aggregators ---


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_padding_order_and_company_change_nothing(kind: str, sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = build_aggregator(aggregator(kind), 6).double().eval()
    bags = [torch.randn(n, 6, dtype=torch.float64) for n in sizes]
    x, mask = pad(bags)
    x = torch.cat([x, torch.full((len(sizes), 3, 6), 1e3, dtype=torch.float64)], 1)  # what stands in the padding must not matter
    mask = torch.cat([mask, torch.zeros(len(sizes), 3, dtype=torch.bool)], 1)
    attention, tiles = model(x, mask)
    torch.testing.assert_close(attention.sum(1), torch.ones(len(sizes), dtype=torch.float64))
    assert (attention[~mask] == 0).all()
    for i, bag in enumerate(bags):
        order = torch.randperm(len(bag))
        alone, alone_tiles = model(bag[order][None], torch.ones(1, len(bag), dtype=torch.bool))
        torch.testing.assert_close(alone[0], attention[i, : len(bag)][order])
        torch.testing.assert_close((alone * alone_tiles).sum(), (attention[i] * tiles[i]).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_twice_is_the_same_bag(kind: str) -> None:
    torch.manual_seed(0)
    model = build_aggregator(aggregator(kind), 6).double().eval()
    bag = torch.randn(9, 6, dtype=torch.float64)

    def logit(x: torch.Tensor) -> torch.Tensor:
        attention, tiles = model(x[None], torch.ones(1, len(x), dtype=torch.bool))
        return (attention * tiles).sum()

    torch.testing.assert_close(logit(torch.cat([bag, bag])), logit(bag))
    torch.testing.assert_close(logit(bag[:1].repeat(7, 1)), logit(bag[:1]))


def test_gated_attention_is_the_published_formula() -> None:
    torch.manual_seed(1)
    model = build_aggregator(aggregator("abmil"), 6).double().eval()
    x = torch.randn(11, 6, dtype=torch.float64)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    h = np.maximum(x.numpy() @ weights["embed.0.weight"].T + weights["embed.0.bias"], 0)
    v = np.tanh(h @ weights["content.weight"].T + weights["content.bias"])
    u = 1 / (1 + np.exp(-(h @ weights["gate.weight"].T + weights["gate.bias"])))
    e = np.exp((v * u) @ weights["weigh.weight"][0] + weights["weigh.bias"])
    pooled = (e / e.sum()) @ h
    expected = pooled @ weights["classify.weight"][0] + weights["classify.bias"][0]
    attention, tiles = model(x[None], torch.ones(1, 11, dtype=torch.bool))
    np.testing.assert_allclose(attention[0].detach().numpy(), e / e.sum())
    assert (attention * tiles).sum().item() == pytest.approx(expected)


def test_unknown_aggregator() -> None:
    with pytest.raises(ValueError, match="expected abmil, mean or max"):
        build_aggregator(aggregator("transmil"), 6)


# --- folds ---


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), folds=st.integers(2, 5))
def test_folds_hold_whole_patients_and_both_classes(studied: tuple[Bags, Features], seed: int, folds: int) -> None:
    bags = [studied[0].rows[i] for i in studied[0].part("train")]
    dealt = grouped_folds(bags, folds, seed)
    assert sorted(i for fold in dealt for i in fold) == list(range(len(bags)))
    groups = [{bags[i].group for i in fold} for fold in dealt]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all({bags[i].label for i in fold} == {0, 1} for fold in dealt)


def test_folds_depend_on_the_seed_and_need_patients(studied: tuple[Bags, Features]) -> None:
    bags = [studied[0].rows[i] for i in studied[0].part("train")]
    assert grouped_folds(bags, 3, 1) == grouped_folds(bags, 3, 1) != grouped_folds(bags, 3, 2)
    positive = [b for b in bags if b.label == 1]
    with pytest.raises(BagError, match="1 training patients with a positive slide"):
        grouped_folds([b for b in bags if b.label == 0] + positive[:1], 3, 0)
    with pytest.raises(SplitError, match="at least 2"):
        grouped_folds(bags, 1, 0)


# --- training ---


def scores(fitted: Fitted, rows: Sequence[int], features: Features) -> np.ndarray:
    return np.array([fitted.read(i, features).score for i in rows])


def test_attention_finds_the_few_tiles_that_the_mean_drowns(studied: tuple[Bags, Features]) -> None:
    bags, features = studied
    fitted = fit(bags, features, fit_config("abmil"), quiet())
    assert len(fitted.ensemble.models) == 6 and all(len(v) == 2 for v in fitted.held_out.values())
    for part in ("internal", "external"):
        rows = bags.part(part)
        assert (scores(fitted, rows, features)[bags.labels(rows) == 1].min() > 0.5).all()
    positive = next(i for i in bags.part("external") if bags.rows[i].label)
    reading = fitted.read(positive, features)
    marked = features[positive][:, 0] > 4
    assert reading.attention.sum() == pytest.approx(1) and marked[reading.attention.argmax()]
    assert reading.attention[marked].sum() > 2 * marked.mean()
    assert np.log(reading.score / (1 - reading.score)) == pytest.approx(reading.contribution.sum())


def test_training_repeats_to_the_bit_and_another_seed_does_not(studied: tuple[Bags, Features]) -> None:
    bags, features = studied
    config = replace(fit_config("abmil"), epochs=2)
    torch.manual_seed(1)
    first = fit(bags, features, config, quiet())
    torch.manual_seed(2)  # the global generator must not matter, nor a cache that holds nothing
    again = fit(bags, Features(bags, 0), config, quiet())
    other = fit(bags, features, replace(config, seed=1), quiet())
    rows = range(len(bags.rows))
    np.testing.assert_array_equal(scores(first, rows, features), scores(again, rows, features))
    assert np.abs(scores(first, rows, features) - scores(other, rows, features)).max() > 1e-3


def test_a_training_slide_is_scored_by_models_that_never_saw_its_patient(studied: tuple[Bags, Features], tmp_path: Path) -> None:
    """Other tiles of one patient change every model but those that hold the patient out: those keep every bit."""
    bags, features = studied
    config = replace(fit_config("abmil"), epochs=2)
    patient = bags.rows[bags.part("train")[0]].group
    mine = [i for i, bag in enumerate(bags.rows) if bag.group == patient]
    before = fit(bags, features, config, quiet())
    for i in mine:
        write_store(tmp_path, bags.rows[i].slide_id, features[i] + 100)
    moved = {i: replace(bags.rows[i], path=tmp_path / f"{bags.rows[i].slide_id}.h5") for i in mine}
    changed = replace(bags, rows=tuple(moved.get(i, bag) for i, bag in enumerate(bags.rows)))
    after = fit(changed, Features(changed, 1 << 30), config, quiet())
    for model in range(6):
        one, two = (fitted.ensemble.models[model].state_dict() for fitted in (before, after))
        assert all(torch.equal(one[name], two[name]) for name in one) == (model in before.held_out[mine[0]])


def test_saved_ensemble_scores_alike(studied: tuple[Bags, Features], tmp_path: Path) -> None:
    bags, features = studied
    fitted = fit(bags, features, replace(fit_config("abmil"), epochs=1), quiet())
    fitted.ensemble.save(tmp_path / "model", {"task": "t", "threshold": 0.4})
    loaded, facts = load_ensemble(tmp_path / "model")
    assert facts["threshold"] == 0.4 and facts["width"] == bags.width
    for i in bags.part("external"):
        assert loaded.read(features[i]).score == fitted.read(i, features).score
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"width": 12', '"width": 9'))
    with pytest.raises(ValueError, match="does not hold what config.json describes"):
        load_ensemble(tmp_path / "model")


def test_a_slide_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        Ensemble([SlideModel(6, aggregator("mean"))], 6, aggregator("mean")).read(np.zeros((3, 5), np.float32))


# --- joining stores and manifest ---


def test_parts_labels_and_what_is_left_out(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=8)
    slides += [slide("nolabel", "q1", "site0", role="train"), slide("nostore", "q2", "site0", role="train", tumour="1")]
    slides += [slide("norole", "q3", "site0", role="monitor", tumour="1")]
    bags = read_bags(tmp_path, slides, TASK, SPLIT)
    assert [len(bags.part(part)) for part in ("train", "internal", "external")] == [8, 4, 4]
    assert set(bags.left_out) == {"nolabel", "nostore", "norole"}
    bag = bags.rows[0]
    assert bag.tiles_um2 == pytest.approx(bag.tiles * 16**2) and bags.encoder == "abc" and bags.width == 12


def test_splits_by_patient_without_roles(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=16)
    split = replace(SPLIT, role=None, external_sites=["out"])
    bags = read_bags(tmp_path, slides, TASK, split)
    groups = {part: {bags.rows[i].group for i in bags.part(part)} for part in ("train", "internal", "external")}
    assert {part: len(names) for part, names in groups.items()} == {"train": 9, "internal": 3, "external": 4}
    assert not groups["train"] & groups["internal"]
    assert {bags.rows[i].site for i in bags.part("external")} == {"out"}
    with pytest.raises(BagError, match="which no labelled slide comes from"):
        read_bags(tmp_path, slides, TASK, replace(split, external_sites=["nowhere"]))


def mutated(slides: list[Slide], i: int, **changes: object) -> list[Slide]:
    return [replace(s, **changes) if j == i else s for j, s in enumerate(slides)]  # type: ignore[arg-type]


def test_leaks_are_errors(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=8)  # slide 0: train p0, slide 4: test p2, slide 6: external p3
    with pytest.raises(SplitError, match="p0 in internal and train"):
        read_bags(tmp_path, mutated(slides, 4, patient_id="p0"), TASK, SPLIT)
    with pytest.raises(BagError, match="external and internal at once"):
        read_bags(tmp_path, mutated(slides, 6, site="site1"), TASK, SPLIT)
    with pytest.raises(BagError, match="no external claim"):
        read_bags(tmp_path, mutated(slides, 6, site=None), TASK, SPLIT)
    with pytest.raises(SplitError, match="set split.unit=slide"):
        read_bags(tmp_path, mutated(slides, 0, patient_id=None), TASK, SPLIT)
    alone = read_bags(tmp_path, mutated(slides, 0, patient_id=None), TASK, replace(SPLIT, unit="slide"))
    assert alone.groups == "slide" and alone.rows[0].group == "s0-0"


def test_bad_labels_and_stores_are_named(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=8)
    with pytest.raises(BagError, match="s0-0: 'maybe'"):
        read_bags(tmp_path, mutated(slides, 0, labels={"tumour": "maybe", "role": "train"}), TASK, SPLIT)
    with pytest.raises(BagError, match="no label column 'grade'; it has role, tumour"):
        read_bags(tmp_path, slides, replace(TASK, label="grade"), SPLIT)
    with pytest.raises(BagError, match="share a value"):
        read_bags(tmp_path, slides, replace(TASK, negative=["0", "1"]), SPLIT)
    with pytest.raises(BagError, match="holds no store"):
        read_bags(tmp_path / "nothing", slides, TASK, SPLIT)
    write_store(tmp_path, "s1-0", np.zeros((3, 12)), encoder="other")
    with pytest.raises(BagError, match="embed all slides with one encoder"):
        read_bags(tmp_path, slides, TASK, SPLIT)
    (tmp_path / "s1-0.h5").write_bytes(b"cut short")
    with pytest.raises(BagError, match="no embedding store"):
        read_bags(tmp_path, slides, TASK, SPLIT)
    with pytest.raises(BagError, match="leaves the folder"):
        read_bags(tmp_path, [replace(slides[0], slide_id="../s0-0")], TASK, SPLIT)


def test_features_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    slides = cohort(tmp_path, patients=8)
    write_store(tmp_path, "s0-0", np.full((3, 12), np.nan))
    bags = read_bags(tmp_path, slides, TASK, SPLIT)
    with pytest.raises(BagError, match="not finite"):
        Features(bags, 1 << 20)[0]
