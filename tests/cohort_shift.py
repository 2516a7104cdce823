"""What a hospital with its own stain costs a slide model, and what stain normalisation and stain jitter change of it:
`python tests/cohort_shift.py OUT SEED…`.

For every cohort seed: the cohort `hospitals` is drawn and indexed, an encoder is pretrained on the training patients with
recipe=demo, all slides are embedded as scanned (with stain-jittered copies), by Macenko and by Reinhard, and the same slide model
is trained on each: its arms differ in the embeddings alone. Everything is read once on held-out patients of the training
hospitals and at the hospital that nothing was trained on. The same command goes on where it was stopped. OUT/table.md is written
anew after every seed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from histoscale.launch.run import invoke

COPIES = 3
ARMS = {"as scanned": [], "HED jitter": [f"copies={COPIES}"], "Macenko": [], "Reinhard": []}
QUIET = "logging.progress=off"
GRID = ["precision=bf16", "grid.mpp=1.0", "grid.patch_px=64", "grid.mpp_tolerance=0.1"]


def slug(arm: str) -> str:
    return arm.lower().replace(" ", "_")


def prepare(folder: Path, seed: int) -> None:
    """Slides, catalog, encoder and every embedding."""
    invoke("cohort", ["cohort=hospitals", f"cohort.seed={seed}", f"out={folder / 'cohort'}", QUIET])
    catalog = f"catalog={folder / 'catalog'}"
    invoke("index", [f"manifest={folder / 'cohort/manifest.csv'}", "tissue.close_um=48", f"out={folder / 'catalog'}", QUIET])
    invoke("pretrain", ["recipe=demo", catalog, f"seed={seed}", "stream.workers=0", f"out={folder / 'pretrain'}", QUIET])
    encoder = f"encoder={folder / 'pretrain'}"
    jitter = f"jitter.copies={COPIES}"
    invoke("embed", [encoder, catalog, *GRID, jitter, f"out={folder / 'embeddings'}", QUIET])
    for name in ("macenko", "reinhard"):
        invoke("embed", [encoder, catalog, *GRID, f"normalise={name}", f"out={folder / f'embeddings_{name}'}", QUIET])
    invoke("embed", ["encoder=colour", catalog, *GRID, f"out={folder / 'embeddings_colour'}", QUIET])


def study(folder: Path, arm: str, more: list[str]) -> dict[str, Any]:
    name = slug(arm)
    stores = folder / (f"embeddings_{name}" if name in ("macenko", "reinhard") else "embeddings")
    return invoke("mil", [
        f"embeddings={stores}", f"floor_embeddings={folder / 'embeddings_colour'}", f"manifest={folder / 'cohort/manifest.csv'}",
        f"catalog={folder / 'catalog'}", f"annotations={folder / 'cohort/truth'}", "task=cohort", *more,
        f"out={folder / f'mil_{name}'}", QUIET,
    ])["mil"]  # fmt: skip


def number(score: dict[str, Any] | None) -> str:
    if score is None:
        return "–"
    ends = "withheld" if score["low"] is None else f"{score['low']:.3f}, {score['high']:.3f}"
    return f"{score['value']:.3f} [{ends}]"


def table(out: Path, seeds: list[int]) -> str:
    areas = "AUROC, internal | AUROC, external | internal − external"
    head = f"| seed | arm | {areas} | pointing gain, internal | pointing gain, external |"
    lines = [head, "|" + "---|" * 7]
    for seed in seeds:
        for arm in ARMS:
            path = out / str(seed) / f"mil_{slug(arm)}" / "summary.json"
            if path.exists():
                found = json.loads(path.read_text())["mil"]
                gains = [number(found["pointing"].get(part, {}).get("gain")) for part in ("internal", "external")]
                found_areas = [number(found[part]["auc"]) for part in ("internal", "external")]
                lines.append(" | ".join([f"| {seed}", arm, *found_areas, number(found["gap"]["auroc"]), *gains]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target, chosen = Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]]
    for seed in chosen:
        home = target / str(seed)
        prepare(home, seed)
        for arm, more in ARMS.items():
            study(home, arm, more)
        invoke(
            "compare", [f"runs=[{','.join(str(home / f'mil_{slug(arm)}') for arm in ARMS)}]", f"out={home / 'compare'}", QUIET]
        )
        (target / "table.md").write_text(table(target, chosen))
        print(table(target, chosen), flush=True)
