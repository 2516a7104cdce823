"""A small study in stores on disk: two slides a patient, few telling tiles, sites that differ in what does not matter."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from histoscale.data.journal import Progress
from histoscale.data.manifest import Slide
from histoscale.eval.mil.aggregators.abmil import AbmilConfig
from histoscale.eval.mil.aggregators.clam import ClamConfig
from histoscale.eval.mil.aggregators.pooling import MaxConfig, MeanConfig
from histoscale.eval.mil.aggregators.transmil import TransmilConfig
from histoscale.eval.mil.bags import Bags
from histoscale.eval.mil.ensemble import Aggregators
from histoscale.eval.mil.features import Features
from histoscale.eval.mil.fit import FitConfig
from histoscale.eval.mil.optimizer import OptimizerConfig, ScheduleConfig
from histoscale.eval.mil.split import FixedSplit, Trial, make_plan
from histoscale.eval.mil.task import BinaryTask

TASK = BinaryTask(
    kind="binary",
    name="t",
    label="tumour",
    positive=["1"],
    negative=["0"],
    sensitivities=[0.95, 0.8],
    specificities=[],
    rule="conformal",
    prevalence=0.1,
    decision="slide",
)
SPLIT = FixedSplit(
    kind="fixed", unit="patient", role="role", train=["train"], internal=["test"], external=["external"], external_sites=[],
    test=0.25, seed=0,
)  # fmt: skip
ABMIL = AbmilConfig(
    kind="abmil", embed=[16], activation="relu", attention=8, gated=True, classify=[], dropout=0.25, attention_dropout=0.0,
    init="torch",
)  # fmt: skip
AGGREGATORS: dict[str, Aggregators] = {
    "abmil": ABMIL,
    "plain_abmil": AbmilConfig("abmil", [], "none", 8, False, [], 0.0, 0.0, "xavier"),
    "mlp_abmil": AbmilConfig("abmil", [16, 12], "none", 8, True, [10, 6], 0.0, 0.25, "torch"),
    "clam": ClamConfig("clam", 16, 8, 0.25, 0.25, 4, False, 0.3),
    "mean": MeanConfig("mean"),
    "max": MaxConfig("max"),
}
TRANSMIL = TransmilConfig("transmil", hidden=16, heads=2, landmarks=4, iterations=6, kernel=3, dropout=0.1)


def fit_config(aggregator: Aggregators, lr: float = 1e-2, **changed: Any) -> FitConfig:
    values: dict[str, Any] = {
        "folds": 3, "repeats": 2, "epochs": 15, "batch": 8, "tiles": 60, "standardise": True, "imbalance": "balanced", "seed": 0,
        "optimizer": OptimizerConfig("adamw", lr, 1e-2, 1e-2, True, None),
        "schedule": ScheduleConfig(0, 0.0, False, "cosine", 0.0),
    }  # fmt: skip
    return FitConfig(aggregator=aggregator, **{**values, **changed})


def quiet() -> Progress:
    return Progress(1, "fit", "epochs", "off", 10)


def slide(name: str, patient: str | None, site: str | None, **labels: str) -> Slide:
    return Slide(name, f"{name}.svs", patient, site, None, None, None, None, None, None, None, labels)


def write_store(folder: Path, name: str, features: np.ndarray, encoder: str = "abc", mpp: float = 0.5) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    side = 64
    coords = np.stack([np.arange(len(features)) % 8 * side, np.arange(len(features)) // 8 * side], 1)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["features"], file["coords"] = features.astype(np.float32), coords
        file.attrs.update(encoder_hash=encoder, mpp=mpp, patch_size=32, patch_size_level0=side, slide_id=name)


def cohort(folder: Path, patients: int = 48, width: int = 12) -> list[Slide]:
    """Of a positive slide three tiles are shifted in one direction; sites differ in another. Columns for every kind of task:
    tumour, grade (a, b, c), number, time (short where the number is large) and event."""
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
            grade, amount = int(rng.integers(0, 3)), float(rng.uniform(0, 4))
            features[:, 2] += 2.5 * grade
            features[:, 3] += amount
            write_store(folder, name, features[rng.permutation(len(features))])
            labels = {"tumour": str(label), "role": role, "grade": "abc"[grade], "number": f"{20 + 5 * amount:.3f}"}
            labels |= {"time": f"{10 * np.exp(-amount) * rng.exponential():.4f}", "event": str(int(rng.uniform() < 0.8))}
            slides.append(slide(name, f"p{patient}", site, **labels))
    return slides


def features_of(bags: Bags, cache_bytes: int = 1 << 30) -> Features:
    return Features([[bag.path] for bag in bags.rows], bags.width, cache_bytes, 1)


def parts(bags: Bags) -> Trial:
    return make_plan(bags, SPLIT).trials[0]
