"""Perturbed and normalised pictures, probes on them, registered tiles: against restatements, and against traps that are known."""

import csv
import io
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from histoscale.data.normalise import macenko, reinhard, vahadane
from histoscale.data.normalise.slide import apply
from histoscale.data.stain import HED
from histoscale.eval.datasets.patches import USAGE_OF_OWN, DatasetError, LabelledPatches
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.robustness.curves import asked_rows, cosine, curve, fit_probes, questions_of
from histoscale.eval.robustness.findings import RobustnessError
from histoscale.eval.robustness.perturb import MethodsConfig, Perturbation, UnitNormaliser, changed_rows, normalised, perturbed
from histoscale.eval.robustness.registered import RegisteredConfig, compare, counterpart_ranks, open_registered
from histoscale.eval.robustness.suite import by_slide, known_of
from histoscale.eval.scores.interval import IntervalConfig
from histoscale.launch.config import load

INTERVAL = IntervalConfig(draws=100, level=0.95, seed=0)
OVERRIDES = ["encoder=unused", "data_root=unused", "methods.macenko.light.pixels=100", "methods.vahadane.light.pixels=100",
             "methods.reinhard.light.pixels=100"]  # fmt: skip


def methods() -> MethodsConfig:
    return TypeAdapter(MethodsConfig).validate_python(load("robustness", OVERRIDES).values["methods"])


def picture(seed: int = 0, side: int = 40, stain: float = 1.0) -> np.ndarray:
    """uint8 [3, side, side] of two stains in patches of their own strengths."""
    rng = np.random.default_rng(seed)
    amounts = np.kron(rng.uniform(0.3, 1.3, (2, side // 4, side // 4)), np.ones((4, 4))) * stain
    density = np.einsum("shw,sc->chw", amounts, np.array([[0.56, 0.72, 0.41], [0.22, 0.80, 0.56]]))
    return (255 * np.exp(-density)).round().clip(0, 255).astype(np.uint8)


def made(pictures: np.ndarray, units: np.ndarray, roles: np.ndarray, labels: np.ndarray) -> LabelledPatches:
    return LabelledPatches(
        name="made", classes=("a", "b"), labels=labels, roles=roles, patients=units, sites=np.full(len(units), "here"),
        groups="patient", mpp=None, size_px=pictures.shape[-1], hash="0", read=lambda rows: pictures[rows], blocks=units,
        slide_ids=units, usage=USAGE_OF_OWN,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "stain"), [("haematoxylin", 0), ("eosin", 1)])
def test_a_shift_of_stain_adds_to_the_density_of_every_pixel(kind: str, stain: int) -> None:
    before = picture().astype(float)
    after = Perturbation(kind, 0.2)(picture()).astype(float)
    moved = -np.log((after + 0.5) / (before + 0.5))
    assert np.abs(moved.mean((1, 2)) - 0.2 * np.array(HED[stain])).max() < 0.02
    back = Perturbation(kind, -0.2)(Perturbation(kind, 0.2)(picture())).astype(float)
    assert np.abs(back - before).max() <= 3


def test_jpeg_is_as_pillow_writes_it_and_others_leave_flat_pictures_alone() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture().transpose(1, 2, 0)).save(buffer, "jpeg", quality=30, subsampling="4:2:0")
    theirs = np.asarray(Image.open(buffer)).transpose(2, 0, 1).astype(int)
    assert np.abs(Perturbation("jpeg", 30)(picture()).astype(int) - theirs).mean() < 1
    flat = np.full((3, 20, 30), 77, np.uint8)
    for kind, level in (("blur_px", 2.0), ("downscale", 4.0), ("jpeg", 50.0)):
        assert np.abs(Perturbation(kind, level)(flat).astype(int) - 77).max() <= 1
        harder = {"blur_px": 3.0, "downscale": 6.0, "jpeg": 5.0}[kind]
        lost = [np.abs(Perturbation(kind, x)(picture()).astype(int) - picture()).mean() for x in (level, harder)]
        assert 0 < lost[0] < lost[1] and Perturbation(kind, level)(picture()).shape == picture().shape


@pytest.mark.parametrize(
    ("kind", "level"), [("blur_px", 0.0), ("jpeg", 0.0), ("jpeg", 50.5), ("downscale", 1.0), ("eosin", np.nan)]
)
def test_levels_that_mean_nothing_are_refused(kind: str, level: float) -> None:
    with pytest.raises(RobustnessError, match=f"perturbations.{kind} has"):
        Perturbation(kind, level).check()


@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_normalisation_is_fitted_by_slide_on_what_is_seen(method: str) -> None:
    pictures = np.stack([picture(i % 4, stain=0.6 if i < 4 else 1.0) for i in range(8)] + [np.full((3, 40, 40), 250, np.uint8)])
    units = np.array(["pale"] * 4 + ["dark"] * 4 + ["glass"])
    patches = made(pictures, units, np.full(9, "train"), np.arange(9) % 2)
    seen, normaliser = normalised(patches, units, method, methods())
    got = np.asarray(seen.read(np.arange(9))).astype(int)
    assert np.abs(pictures[:4].astype(int) - pictures[4:8]).mean() > 3 * np.abs(got[:4] - got[4:8]).mean()  # one strength of two
    assert (got[8] == 250).all() and normaliser is not None and list(normaliser.refused(np.arange(9))) == ["glass"]
    assert not normaliser.refused(np.arange(8))
    assert (np.asarray(seen.read(np.array([5, 1]))) == got[[5, 1]]).all()  # whatever is read beside it
    paler = perturbed(patches, Perturbation("haematoxylin", -0.1))
    again, _ = normalised(paler, units, method, methods())
    config, light = getattr(methods(), method), np.asarray(paler.read(np.arange(4)))
    fit = {"macenko": macenko.fit, "vahadane": vahadane.fit, "reinhard": reinhard.fit}[method]
    fitted = fit(light.transpose(0, 2, 3, 1).reshape(-1, 3), config)  # of the pictures as they are after the change
    by_hand = apply(torch.from_numpy(light.transpose(0, 2, 3, 1).copy()), fitted, config).numpy().transpose(0, 3, 1, 2)
    assert (np.asarray(again.read(np.arange(4))) == by_hand).all()
    assert (
        len({patches.hash, seen.hash, paler.hash, again.hash}) == 4
        and normalised(patches, units, "none", methods())[0] is patches
    )


@pytest.mark.parametrize("method", ["none", "macenko", "vahadane", "reinhard"])
def test_a_perturbation_of_no_strength_changes_nothing_whatever_is_asked(method: str) -> None:
    pictures = np.stack([picture(i, stain=0.5 + 0.1 * i) for i in range(8)])
    units, asked, read = np.repeat(["one", "two"], 4), np.array([1, 2, 3]), list[int]()
    patches = replace(
        made(pictures, units, np.full(8, "train"), np.arange(8) % 2), read=lambda rows: read.extend(rows) or pictures[rows]
    )
    clean = np.asarray(normalised(patches, units, method, methods())[0].read(asked))
    read.clear()
    part, _ = changed_rows(patches, asked, units, Perturbation("eosin", 0.0), method, methods())
    assert (np.asarray(part.read(np.arange(3))) == clean).all() and len(part) == 3
    assert set(read) <= {0, 1, 2, 3}  # nothing of a slide that nobody asks for
    moved, _ = changed_rows(patches, asked, units, Perturbation("eosin", 0.1), "none", methods())
    assert not (np.asarray(moved.read(np.arange(3))) == pictures[asked]).all()


def test_slides_whose_names_run_together_are_normalised_anew() -> None:
    patches = made(np.stack([picture(i) for i in range(2)]), np.array(["1", "11"]), np.full(2, "train"), np.arange(2))
    first, other = (normalised(patches, np.array(units), "reinhard", methods())[0] for units in (["1", "11"], ["11", "1"]))
    assert first.hash != other.hash


def test_a_fit_sees_at_most_the_pictures_of_its_sample() -> None:
    pictures = np.stack([picture(i) for i in range(30)])
    units, read = np.full(30, "one"), []
    patches = replace(
        made(pictures, units, np.full(30, "train"), np.arange(30) % 2), read=lambda rows: read.append(rows) or pictures[rows]
    )
    UnitNormaliser(patches, units, methods().macenko).fitted(0)
    assert [len(rows) for rows in read] == [8]


PROBE = ProbeConfig("cls", [1.0, 0.1, 0.01], 0.1, 3, 1e-6, 2e-3, 200, 5, 0.07, 0)


def test_a_curve_reads_clean_probes_on_changed_rows() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    x = (rng.normal(size=(400, 6)) + 3 * labels[:, None] * (np.arange(6) < 2)).astype(np.float32)
    patients = np.array([f"P{i // 8}" for i in range(400)])
    roles = np.where(np.arange(400) < 200, "train", "report")
    patches = made(np.zeros((400, 3, 4, 4), np.uint8), patients, roles, labels)
    questions = questions_of(patches, 3, 0)
    (asked,) = asked_rows(patches, questions, patients, "patient", 120, INTERVAL)
    assert len(asked.rows) == 120 and (asked.rows >= 200).all() and (np.diff(asked.rows) > 0).all()
    probed = fit_probes(x, questions, PROBE, "cpu")
    moved = {"turned": -x[asked.rows], "same": x[asked.rows] * 1.0}
    found = {
        (one.measure, one.condition, one.minus): one for one in curve("e", False, "none", probed, asked, x[asked.rows], moved, 2)
    }
    clean = found["balanced_accuracy", "report, clean", ""].interval
    by_hand = probed.probes[0].log_probabilities(x[asked.rows]).argmax(1)
    recall = [(by_hand == labels[asked.rows])[labels[asked.rows] == c].mean() for c in range(2)]
    assert clean.value == pytest.approx(np.mean(recall)) and clean.value > 0.9 and clean.patients == 25
    assert found["balanced_accuracy", "report, turned", ""].interval.value < 0.5
    same = found["balanced_accuracy", "report, same", "clean"].interval
    assert (same.value, same.low, same.high) == (0, 0, 0)  # paired: no chance of the draw is left
    assert found["cosine_to_clean", "report, turned", ""].interval.value == pytest.approx(-1)
    outer = replace(patches, usage=replace(USAGE_OF_OWN, choose="outer"))
    folds = questions_of(outer, 4, 0)
    (asked,) = asked_rows(outer, folds, patients, "patient", None, INTERVAL)
    assert len(folds) == 4 and len(asked.rows) == 400 and asked.role == "outer"
    called = fit_probes(x, folds, PROBE, "cpu").predicted(x, asked.rows, "outer")
    assert (called >= 0).all() and (called == labels).mean() > 0.9


def test_slides_stand_in_the_place_of_unknown_patients() -> None:
    slides, labels = np.array([f"S{i // 4}" for i in range(48)]), np.arange(48) % 2
    roles = np.where(np.arange(48) < 24, "train", "report")
    single = np.array([f"image {i}" for i in range(48)])
    patches = replace(made(np.zeros((48, 3, 4, 4), np.uint8), single, roles, labels), slide_ids=slides, groups="none")
    patches = replace(patches, notes=("groups: none; intervals take every image as independent", "another"))
    found = by_slide(patches)
    assert (found.patients == slides).all() and found.groups == "slide" and known_of(found).groups == "slide"
    assert found.notes[0] == "another" and "slides stand in their place" in found.notes[1]
    outer = by_slide(replace(patches, roles=np.full(48, "train"), usage=replace(USAGE_OF_OWN, choose="outer")))
    for question in questions_of(outer, 4, 0):
        assert not set(slides[question.train]) & set(slides[question.asked["outer"]])
    torn = replace(patches, roles=np.where(np.arange(48) < 26, "train", "report"))
    with pytest.raises(DatasetError, match="1 slides stand in both train and report"):
        by_slide(torn)
    assert by_slide(replace(patches, groups="patient")).groups == "patient"


# Registered tiles.


def test_ranks_are_those_of_a_loop_and_norms_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(9, 5))
    b = a + rng.normal(size=(9, 5))
    ranks = counterpart_ranks(a, b)
    both = np.concatenate([a, b])
    for row in range(18):
        near = cosine(np.tile(both[row], (18, 1)), both)
        own = (row + 9) % 18
        assert ranks[row] == sum(near[i] > near[own] for i in range(18) if i not in (row, own))
    large = (a * 300).astype(np.float16)
    assert np.linalg.norm(large.astype(float), axis=1).max() > 256 and np.isfinite(cosine(large, large)).all()
    assert (counterpart_ranks(large, large) == 0).all()
    assert (counterpart_ranks(np.ones((4, 3)), np.ones((4, 3))) == 3).all()  # where all are equal, half of 6 are nearer
    twice = np.array([[1.0, 0], [1.0, 0], [0, 1]])  # the counterpart ties with two others, which have no tie of their own
    assert counterpart_ranks(twice, twice).tolist() == [1, 1, 0, 1, 1, 0]


def test_features_that_are_all_equal_find_nothing(tmp_path: Path) -> None:
    registered(tmp_path, [("s1", "a"), ("s2", "a")], 24)
    config = RegisteredConfig([1, 10], None)
    held = open_registered(tmp_path, config, 1)
    found = compare("e", False, "none", np.ones((48, 4)), held, config, INTERVAL)
    assert {one.measure: one.interval.value for one in found if one.condition == "all"} == {
        "cosine": pytest.approx(1),
        "top-1": 0,
        "top-10": 0,
    }


def registered(root: Path, conditions: list[tuple[str, str]], tiles: int) -> None:
    rows = []
    for scanner, stain in conditions:
        for tile in range(tiles):
            name = f"{scanner}{stain}{tile}.png"
            Image.fromarray(picture(tile, 8).transpose(1, 2, 0)).save(root / name)
            rows.append({"path": name, "tile_id": f"T{tile}", "scanner": scanner, "stain": stain, "patient_id": f"P{tile // 2}"})
    write(root, rows)


def write(root: Path, rows: list[dict[str, str]]) -> None:
    with (root / "registered.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_medians_over_pairs_of_slides_are_those_of_a_loop(tmp_path: Path) -> None:
    conditions = [("s1", "a"), ("s1", "b"), ("s2", "a"), ("s2", "b"), ("s3", "a")]
    registered(tmp_path, conditions, 24)
    held = open_registered(tmp_path, RegisteredConfig([1, 10], None), 1)
    x = np.random.default_rng(0).normal(size=(120, 6)) + np.repeat(
        np.random.default_rng(1).normal(size=(1, 24, 6)), 5, 0
    ).reshape(-1, 6)
    found = {
        (one.measure, one.condition): one
        for one in compare("e", False, "none", x, held, RegisteredConfig([1, 10], None), INTERVAL)
    }
    values: dict[tuple[str, str], list[float]] = {}
    for (i, (scanner, stain)), (j, (other, dye)) in combinations(enumerate(conditions), 2):
        a, b = x[24 * i : 24 * i + 24], x[24 * j : 24 * j + 24]
        ranks = counterpart_ranks(a, b)
        kind = "both" if scanner != other and stain != dye else "scanner" if scanner != other else "stain"
        for name in ("all", kind):
            values.setdefault(("cosine", name), []).append(cosine(a, b).mean())
            values.setdefault(("top-1", name), []).append((ranks < 1).mean())
            values.setdefault(("top-10", name), []).append((ranks < 10).mean())
    for place, each in values.items():
        assert found[place].interval.value == pytest.approx(np.median(each)), place
        assert found[place].about["slide_pairs"] == len(each) and found[place].interval.patients == 12
    four = [values["cosine", "all"], *(values["top-10", kind] for kind in ("scanner", "stain", "both"))]
    assert found["leaderboard", ""].interval.value == pytest.approx(np.mean([round(float(np.median(each)), 3) for each in four]))


def test_a_table_of_registered_tiles_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    config = RegisteredConfig([1], None)
    with pytest.raises(RobustnessError, match="holds no registered.csv"):
        open_registered(tmp_path, config, 1)
    registered(tmp_path, [("s1", "a"), ("s2", "a")], 3)
    with (tmp_path / "registered.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for change, words in (
        ({"path": "../escape.png"}, "leaves the folder"),
        ({"tile_id": "T1"}, "tile 'T1' of scanner 's1' and stain 'a' stands twice"),
        ({"stain": ""}, "lacks one of them"),
    ):
        write(tmp_path, [{**rows[0], **change}, *rows[1:]])
        with pytest.raises(RobustnessError, match=words):
            open_registered(tmp_path, config, 1)
    write(tmp_path, [*rows[:2], rows[3]])
    with pytest.raises(RobustnessError, match="the slides s1 / a and s2 / a share 1 tiles: expected at least two"):
        open_registered(tmp_path, config, 1)
    with (tmp_path / "registered.csv").open("w") as file:
        file.write("tile_id,scanner,stain,path\nT0,s1,a\n")
    with pytest.raises(RobustnessError, match="line 2: the image '' is missing"):
        open_registered(tmp_path, config, 1)
    write(tmp_path, rows[:3])
    with pytest.raises(RobustnessError, match="1 combinations of scanner and stain"):
        open_registered(tmp_path, config, 1)
    write(tmp_path, [{k: v for k, v in row.items() if k != "stain"} for row in rows])
    with pytest.raises(RobustnessError, match="lacks the column stain"):
        open_registered(tmp_path, config, 1)


def test_registered_tiles_may_be_named_by_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(tmp_path, [("s1", "a"), ("s2", "a")], 3)
    wanted = open_registered(tmp_path, RegisteredConfig([1], None), 1).patches.hash
    with (tmp_path / "registered.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    write(tmp_path, [{**row, "path": f"{tmp_path}/{row['path']}"} for row in rows])
    monkeypatch.chdir(tmp_path)
    assert open_registered(Path("."), RegisteredConfig([1], None), 1).patches.hash == wanted


def test_perturbed_pictures_do_not_depend_on_threads() -> None:
    before = Perturbation("downscale", 2.0)(picture())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert (Perturbation("downscale", 2.0)(picture()) == before).all()
    torch.set_num_threads(threads)
