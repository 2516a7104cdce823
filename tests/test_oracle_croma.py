"""Published robustness measures on the same features: CRoMa's package (Apache-2.0), which holds PathoROB's reduction of the drop.

    pip install --no-deps --target ORACLE croma==1.0.1 pandas==3.1.1 python-dateutil==4.0.0
    PYTHONPATH=ORACLE pytest tests/test_oracle_croma.py

PathoROB's own code as a whole runs in tests/oracle_pathorob.py.
"""

import warnings
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from histoscale.eval.robustness.confounding import drop
from histoscale.eval.robustness.neighbours import NeighboursConfig, Where, count, margins, tail_mean

WHY = "croma is not installed: see the first lines of this file"


@pytest.fixture(scope="module")
def croma() -> Any:
    pytest.importorskip("pandas", reason=WHY)
    return pytest.importorskip("croma", reason=WHY)


def features_and_where() -> tuple[np.ndarray, Where]:
    """3 classes at 3 sites, 5 slides of a class at a site, 7 patches each, in no order."""
    rng = np.random.default_rng(0)
    places = np.array([(c, s, slide) for c, s, slide, _ in product(range(3), range(3), range(5), range(7))])
    places = places[rng.permutation(len(places))]
    slides = np.array([f"{c} {s} {slide}" for c, s, slide in places])
    _, codes = np.unique(slides, return_inverse=True)
    x = rng.normal(size=(3, 20))[places[:, 0]] + rng.normal(size=(3, 20))[places[:, 1]] + rng.normal(size=(45, 20))[codes] * 0.7
    return x + rng.normal(size=x.shape) * 1.5, Where(places[:, 0], places[:, 1], slides, slides)


def manifest(where: Where, rows: np.ndarray) -> dict[str, Any]:
    return {
        "sample_id": [f"row {row}" for row in rows], "image_path": ["none"] * len(rows), "group_id": where.units[rows],
        "label": [f"class {c}" for c in where.biology[rows]], "center": [f"site {s}" for s in where.sites[rows]],
    }  # fmt: skip


@pytest.mark.parametrize("k", [None, 11])
def test_the_index_and_its_k_are_theirs(croma: Any, k: int | None) -> None:
    import pandas as pd

    x, where = features_and_where()
    tried = [k] if k else [1, 3, 5, 7, 9, *range(11, 100, 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that have no typed neighbour
        table = pd.DataFrame(manifest(where, np.arange(len(x))))
        theirs = croma.RI.compute(x, table, confounder_column="center", k_candidates=tried)
    ours = count(x, where, NeighboursConfig(k, 100, False, 5, 0.1))
    assert ours.k == theirs.k and ours.index == pytest.approx(theirs.value, abs=1e-12)
    assert (ours.same[:, [1, 2]].sum(1) > 0).mean() == pytest.approx(theirs.support)


def test_the_index_of_pairs_is_theirs(croma: Any) -> None:
    import pandas as pd

    x, where = features_and_where()
    parts, rows = [], []
    for classes, sites in product(combinations(range(3), 2), combinations(range(3), 2)):
        inside = np.flatnonzero(np.isin(where.biology, classes) & np.isin(where.sites, sites))
        parts.append(pd.DataFrame(manifest(where, inside)).assign(subset=f"{classes} {sites}"))
        rows.append(inside)
    table = pd.concat(parts, ignore_index=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = croma.RI.compute(
            x[np.concatenate(rows)], table, confounder_column="center", k_candidates=[11], evaluation_design="paired_2x2"
        )
    assert count(x, where, NeighboursConfig(11, 100, True, 5, 0.1)).index == pytest.approx(theirs.value, abs=1e-12)


def test_margins_and_their_tail_are_theirs(croma: Any) -> None:
    import pandas as pd

    x, where = features_and_where()
    theirs = croma.CRoMa.compute(x, pd.DataFrame(manifest(where, np.arange(len(x)))), confounder_column="center")
    ours = margins(x, where, 5)
    assert np.median(ours) == pytest.approx(theirs.value, abs=1e-12)
    assert tail_mean(ours, 0.1) == pytest.approx(theirs.ltm_alpha, abs=1e-12)


def test_the_drop_is_theirs(croma: Any) -> None:
    accuracy = np.random.default_rng(0).uniform(0.4, 1, (5, 20))
    assert drop(accuracy) == pytest.approx(croma.apd(accuracy), abs=1e-12)
