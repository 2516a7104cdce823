"""Slides, cases and configurations for the tests of heatmaps and pages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter

from histoscale.data.readers.layout import read_layout
from histoscale.data.readers.pyramid import Reader
from histoscale.data.readers.region import open_reader
from histoscale.data.storage import Store
from histoscale.eval.evidence.case import Case, EvidenceConfig, Finding

ROOT = Path(__file__).resolve().parents[1]
MPP = 0.5


def evidence_config(**changes: Any) -> EvidenceConfig:
    """The committed default with few random orders, and what a test changes."""
    values = yaml.safe_load((ROOT / "configs/evidence/default.yaml").read_text())
    config = TypeAdapter(EvidenceConfig).validate_python(values)
    quick = replace(config, deletion=replace(config.deletion, steps=5, draws=3), patches=3)
    return replace(quick, **changes)


def open_slide(path: Path, store: Store) -> Reader:
    return open_reader(str(path), read_layout(str(path), store), store)


def grid(width: int, height: int, size_px: int) -> np.ndarray:
    """int64 [n, 2]: corners of the whole tiles of a slide."""
    return np.stack(np.meshgrid(np.arange(width // size_px), np.arange(height // size_px)), -1).reshape(-1, 2) * size_px


def softmax_case(reader: Reader | None, coords: np.ndarray, size_px: int, slide_id: str = "s1", **changes: Any) -> Case:
    """A bag whose model is known in closed form: attention is softmax(2 x0), a tile's logit 3 x0 - 1; tile 0 leads."""
    rng = np.random.default_rng(len(coords))
    features = rng.normal(size=(len(coords), 2))
    features[0, 0] = features[:, 0].max() + 1

    def weights(x: np.ndarray) -> np.ndarray:
        raised = np.exp(2 * x[:, 0] - 2 * x[:, 0].max())
        return raised / raised.sum()

    def logit(x: np.ndarray) -> float:
        return float(weights(x) @ (3 * x[:, 0] - 1))

    attention = weights(features)
    contribution = attention * (3 * features[:, 0] - 1)
    whole = contribution.sum()
    finding = Finding(0.93, "probability of tumour 0.930", "flagged from 0.41 on", True, 1.0)
    case = Case(
        slide_id, "p1", {"patient": "p1", "site": "north"}, {"label": "yes"}, finding, "tumour", coords, size_px, attention,
        contribution, whole - (whole - contribution) / (1 - attention), lambda: features, logit, reader, MPP, None,
    )  # fmt: skip
    return replace(case, **changes)
