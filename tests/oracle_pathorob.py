"""PathoROB's code beside ours on the same features: index, paired index, clustering score, performance drop; and PLISM's.

    git clone https://github.com/bifold-pathomics/PathoROB
    pip install --target OTHER --no-deps pandas python-dateutil seaborn
    git clone https://github.com/owkin/plism-benchmark && pip install --target OTHER --no-deps loguru   # if PLISM is given
    PLISM=plism-benchmark PATHOROB=PathoROB PYTHONPATH=.ns:OTHER python tests/oracle_pathorob.py OUT

OUT takes the features as PathoROB reads them. Prints both numbers and their difference, and fails above 1e-9.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, os.environ["PATHOROB"])
import pandas as pd
from pathorob.apd.train_model import train_logistic_regression
from pathorob.apd.utils import compute_apd, get_patches_map_to_split
from pathorob.clustering_score.clustering_score import compute as their_clusters
from pathorob.features.data_manager import FeatureDataManager
from pathorob.robustness_index.robustness_index import compute as their_index

from histoscale.eval.robustness.clusters import ClustersConfig, cluster
from histoscale.eval.robustness.confounding import drop, fit, shares
from histoscale.eval.robustness.curves import cosine
from histoscale.eval.robustness.neighbours import NeighboursConfig, Where, count
from histoscale.eval.robustness.registered import counterpart_ranks
from histoscale.eval.scores.interval import IntervalConfig

INTERVAL = IntervalConfig(20, 0.95, 0)
SETS = {  # name: metadata, sites, classes, slides of a cell, patches of a slide
    "camelyon": ("camelyon", ["RUMC", "UMCU"], ["normal", "tumor"], 6, 12),
    "tolkach_esca": ("tolkach_esca_reduced", ["A", "B", "C"], ["ADVENT", "TUMOR", "SH_OES"], 4, 8),
    "tcga": ("tcga_2x2", ["Asterand", "Cureline", "Roswell"], ["BRCA", "COAD", "LUAD"], 4, 10),
}


def made(name: str) -> tuple[pd.DataFrame, np.ndarray]:
    _, sites, classes, slides, each = SETS[name]
    rng = np.random.default_rng(len(name))
    towards = rng.normal(size=(len(sites) + len(classes), 24))
    rows, features = [], []
    for s, site in enumerate(sites):
        for c, kind in enumerate(classes):
            for slide in range(slides):
                own = rng.normal(size=24)
                for patch in range(each):
                    features.append(towards[s] + towards[len(sites) + c] + own * 0.7 + rng.normal(size=24) * 1.5)
                    # barcodes as long as TCGA's, of which the first 12 letters are the case
                    rows.append(("ID", f"{site[:3]}-{kind[:3]}-{slide:04}-slide", str(patch), kind, site))
    columns = ["subset", "slide_id", "patch_id", "biological_class", "medical_center"]
    # classes and sites in the order of their names, in which both then put rows together: k-means starts from chosen rows
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: (rows[i][3], rows[i][4]))
    return pd.DataFrame([rows[i] for i in order], columns=columns), np.array(features, np.float32)[order]


def where_of(table: pd.DataFrame) -> Where:
    biology, sites = (np.unique(table[column], return_inverse=True)[1] for column in ("biological_class", "medical_center"))
    slides = table["slide_id"].to_numpy(dtype=str)
    return Where(biology, sites, slides, slides)


def show(what: str, theirs: float, ours: float) -> bool:
    print(f"{what:<44} theirs {theirs:.12f}  ours {ours:.12f}  difference {abs(theirs - ours):.1e}")
    return abs(theirs - ours) <= 1e-9


def paired(table: pd.DataFrame) -> pd.DataFrame:
    """Every pair of classes at every pair of sites as a subset of its own, as tcga_2x2.csv names them."""
    kinds, sites = sorted(table["biological_class"].unique()), sorted(table["medical_center"].unique())
    parts = []
    for a, first in enumerate(kinds):
        for second in kinds[a + 1 :]:
            for b, here in enumerate(sites):
                for there in sites[b + 1 :]:
                    keep = table["biological_class"].isin([first, second]) & table["medical_center"].isin([here, there])
                    parts.append(table[keep].assign(subset=f"{first}-{second}-{here}-{there}"))
    return pd.concat(parts, ignore_index=True)


def main(out: Path) -> None:
    good = []
    for name, (metadata, *_rest) in SETS.items():
        table, features = made(name)
        where, pairs = where_of(table), name == "tcga"
        (out / "metadata").mkdir(parents=True, exist_ok=True)
        (paired(table) if pairs else table).to_csv(out / f"metadata/{metadata}.csv", index=False)
        FeatureDataManager(out / "features", out / "metadata").save_features("made", name, features, table)
        places = {"features_dir": str(out / "features"), "metadata_dir": str(out / "metadata")}
        for k in (11, -1) if not pairs else (21,):
            results = str(out / f"index{k}")
            with contextlib.redirect_stdout(io.StringIO()):
                their_index("made", name, results_dir=results, k_opt_param=k, num_workers=1, **places)
            (path,) = Path(results).rglob(f"*{name}*/**/results_summary.json")
            found = json.loads(path.read_text())
            ours = count(features, where, NeighboursConfig(k if k > 0 else None, 600, pairs, 5, 0.1))
            good.append(show(f"robustness index, {name}, k {found['k_opt']}", found["robustness_index"], ours.index))
            good.append(found["k_opt"] == ours.k)
        if not pairs:  # their tcga reads another table here
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if name == "camelyon":
                    table.to_csv(out / "metadata/camelyon_reduced.csv", index=False)
                theirs = their_clusters("made", name, results_dir=str(out / "clusters"), maxK=6, num_trials=5, **places)
            ours_ = cluster(features, where, ClustersConfig(2, 6, 20, 5, 5, 1337, None), INTERVAL)
            good.append(show(f"clustering score, {name}", theirs["clustering_score_mean"], ours_.interval.value))
            good.append(show(f"  its SD over trials, {name}", theirs["clustering_score_mean_std"], ours_.spread))
    good += drops()
    if "PLISM" in os.environ:
        good += plism()
    sys.exit(0 if all(good) else 1)


def drops() -> list[bool]:
    """Camelyon's splits by both: their table of slides, their fit; ours."""
    good = []
    for split in range(8):
        theirs, _ = get_patches_map_to_split("camelyon", split, 1)
        ours = shares(2, 2, 7, split, 8, [1, 0])
        good.append(all(ours[site, kind] == slides for site, kind, slides in theirs))
    rng = np.random.default_rng(0)
    powers = np.linspace(-8, 4, 15).tolist()
    accuracy = np.zeros((2, 4, 3))
    for split in range(4):
        for number in range(3):
            x, y = rng.normal(size=(240, 24)).astype(np.float32), rng.integers(0, 3, 240)
            x[:, 0] += y * (1 - 0.2 * split)
            parts = (slice(0, 100), slice(100, 160), slice(160, 240))
            _, _, (theirs_,) = train_logistic_regression(
                x[parts[0]], y[parts[0]], x[parts[1]], y[parts[1]], [x[parts[2]]], [y[parts[2]]]
            )
            model = fit(x[parts[0]], y[parts[0]], x[parts[1]], y[parts[1]], powers)
            called = model.predict(x[parts[2]])
            accuracy[:, split, number] = theirs_, np.mean([(called == y[parts[2]])[y[parts[2]] == c].mean() for c in range(3)])
    for path in sorted(Path(os.environ["PATHOROB"], "results/apd").rglob("*_raw.json")):  # as published
        raw, told = (json.loads(path.with_name(path.name.replace("raw", kind)).read_text()) for kind in ("raw", "summary"))
        for part in ("ID", "OOD"):
            ours_ = float(drop(np.array(raw[f"{part}_test_accuracies"])))
            good.append(show(f"published drop {part}, {path.parent.name}, {path.stem}", told[f"apd_{part.lower()}"], ours_))
    good.append(show("performance drop", float(np.mean(compute_apd(accuracy[0]))), float(drop(accuracy[1]))))
    return good


def plism() -> list[bool]:
    """owkin/plism-benchmark's cosine and retrieval of two registered slides, in full precision."""
    sys.path.insert(0, os.environ["PLISM"])
    from plismbench.metrics.cosine_similarity import CosineSimilarity
    from plismbench.metrics.retrieval import TopkAccuracy

    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 24)) * 30
    b = a + rng.normal(size=a.shape) * 40
    theirs = TopkAccuracy("cpu", use_mixed_precision=False).compute_metric(a, b)
    ranks = counterpart_ranks(a, b)
    good = [show("PLISM: cosine", CosineSimilarity("cpu", False).compute_metric(a, b), float(cosine(a, b).mean()))]
    return good + [
        show(f"PLISM: top-{k}", float(one), float((ranks < k).mean())) for k, one in zip((1, 3, 5, 10), theirs, strict=True)
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
