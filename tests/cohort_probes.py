"""Does training raise the online probe, on cohorts that nobody looked at? `python tests/cohort_probes.py OUT SEED… [arms=a,b]`.

For every cohort seed: the cohort is drawn and indexed, and each arm is pretrained with recipe=demo and probed every 25 steps on
patients that it never saw. Arms run in the order below, each over all seeds, one run at a time; the same command goes on where it
was stopped. OUT/table.md and OUT/points.png are written anew after every run; `arms=` with nothing behind it only writes those.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from histoscale.launch.run import invoke

ARMS = {
    "DINOv2 + KoLeo": [],
    "DINO": ["method=demo_dino"],
    "DINOv2 + KDE": ["method.koleo_weight=0", "method.kde_weight=0.05", "method.kde_kappa=5"],  # arXiv 2408.00738's
}
EVERY = 25


def prepare(folder: Path, seed: int) -> None:
    """A cohort with 24 patients to train and to learn from, and 22 others to report on, and its catalog."""
    quiet = "logging.progress=off"
    invoke("cohort", ["cohort=online", f"cohort.seed={seed}", f"out={folder / 'cohort'}", quiet])
    manifest = f"manifest={folder / 'cohort/manifest.csv'}"
    invoke("index", [manifest, "tissue.close_um=48", f"out={folder / 'catalog'}", quiet])


def pretrain(folder: Path, seed: int, arm: str) -> None:
    """One arm on one cohort. The untrained encoders of the first arm serve the others: they are the same."""
    out, first = folder / slug(arm), folder / slug(next(iter(ARMS)))
    if out != first and first.exists() and not (out / "online").exists():
        (out / "online").mkdir(parents=True)
        for kept in (first / "online").glob("random-*.npz"):
            shutil.copy(kept, out / "online")
    invoke("pretrain", [
        "recipe=demo", *ARMS[arm], f"catalog={folder / 'catalog'}", f"seed={seed}", f"monitor.labelled={folder / 'cohort'}",
        f"monitor.labelled_every={EVERY}", "monitor.every=5", "stream.workers=0", "logging.progress=off", f"out={out}",
    ])  # fmt: skip


def slug(arm: str) -> str:
    return arm.lower().replace(" + ", "_")


def results(out: Path, seeds: list[int]) -> dict[tuple[str, int], dict[str, Any]]:
    """By arm and seed, what `pretrain` says of its online probes; finished runs only."""
    found = {}
    for arm in ARMS:
        for seed in seeds:
            path = out / str(seed) / slug(arm) / "summary.json"
            if path.exists():
                found[arm, seed] = json.loads(path.read_text())
    return found


def table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Markdown, a row a run."""
    lines = [
        "| arm | seed | linear, last three | untrained | difference | Spearman | kNN, last three | untrained | difference | "
        "Spearman | CE / ln K | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (arm, seed), summary in found.items():
        online, last = summary["pretrain"]["online"], summary["pretrain"]["last"]
        linear, knn = online["linear"], online["knn"]
        lines.append(
            f"| {arm} | {seed} | {linear['last']['value']:.3f} | {linear['random']:.3f} | {_interval(linear)} | "
            f"{linear['spearman']:+.2f} | {knn['last']['value']:.3f} | {knn['random']:.3f} | {_interval(knn)} | "
            f"{knn['spearman']:+.2f} | "
            f"{last['dino/ce_of_lnk']:.3f} | {summary['run']['seconds'] / 60:.1f} |"
        )
    for arm in ARMS:
        for probe in ("linear", "knn"):
            lows = [s["pretrain"]["online"][probe]["last_minus_random"]["low"] for (name, _), s in found.items() if name == arm]
            if lows:
                lines.append(
                    f"\n{arm}, {probe}: the interval lies above zero in {sum(low > 0 for low in lows)} of {len(lows)} seeds."
                )
    return "\n".join(lines) + "\n"


def _interval(probe: dict[str, Any]) -> str:
    row = probe["last_minus_random"]
    return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def plot(found: dict[tuple[str, int], dict[str, Any]], path: Path) -> None:
    """Every probe point of every run, and the untrained floor as a dashed line: a column an arm, linear above kNN."""
    figure = Figure(figsize=(4 * len(ARMS), 6), layout="constrained")
    axes = figure.subplots(2, len(ARMS), sharex=True, sharey="row", squeeze=False)
    seeds = sorted({seed for _, seed in found})
    for (arm, seed), summary in found.items():
        online, colour = summary["pretrain"]["online"], f"C{seeds.index(seed)}"
        for row, probe in enumerate(("linear", "knn")):
            place = axes[row, list(ARMS).index(arm)]
            place.plot(online["steps"], online[probe]["points"], "o-", color=colour, label=str(seed), markersize=3)
            place.axhline(online[probe]["random"], color=colour, linestyle="--", linewidth=0.7)
    for column, arm in enumerate(ARMS):
        axes[0, column].set_title(arm)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("linear probe, balanced accuracy")
    axes[1, 0].set_ylabel("kNN, balanced accuracy")
    axes[0, 0].legend(title="seed", fontsize=7)
    figure.savefig(path, dpi=90)


def main(arguments: list[str]) -> None:
    out, chosen = Path(arguments[0]), list(ARMS)
    seeds = [int(text) for text in arguments[1:] if not text.startswith("arms=")]
    for text in arguments[1:]:
        if text.startswith("arms="):
            chosen = [arm for arm in ARMS if slug(arm) in text.removeprefix("arms=").split(",")]
    for arm in chosen:
        for seed in seeds:
            prepare(out / str(seed), seed)
            pretrain(out / str(seed), seed, arm)
            write(out, seeds)
    write(out, seeds)


def write(out: Path, seeds: list[int]) -> None:
    found = results(out, seeds)
    (out / "table.md").write_text(table(found))
    plot(found, out / "points.png")


if __name__ == "__main__":
    main(sys.argv[1:])
