"""Scores that others have published, as facts with their sources, and which of them may stand beside one of ours.

The rows are quotations: each keeps its source, its split, its embedding and the protocol that made it. Protocols changed over the
years by up to a point, so rows of two protocols never share a column.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

FILE = "published_scores.csv"
COLUMNS = ("source", "model", "pretraining", "embedding", "task", "split", "metric", "value", "sd", "protocol_version")

# What sets a protocol apart from the others that report the same tasks (kaiko-ai/eva and forks of it; read in their sources).
PROTOCOLS = {
    "eva-2025-03": "CLS; AdamW 3e-4, a third of it for five epochs; patience 20 %; MonaiDice; the present leaderboard",
    "eva-2024-11-adamw": "CLS; AdamW 3e-4, nearly constant; patience 5 %; generalised Dice with a newer decoder",
    "eva-2024-10-adamw": "CLS; AdamW 3e-4, nearly constant; patience 5 %; generalised Dice",
    "eva-2024-10-sgd-smallwsi": "CLS; SGD with a cosine; patience 5 %; small slide tasks",
    "eva-2024-09-sgd-fullwsi": "CLS; SGD with a cosine; patience 5 %; full slide tasks",
    "eva-2024-03-sgd": "CLS; SGD 0.01 at a batch of 4,096, Nesterov, cosine; patience 5 %; the first leaderboard",
    "midnight-fork-2025": "CLS+mean; cosine; no early stop; a fork of eva",
    "midnight-fork-2025-v1": "as midnight-fork-2025, before some slide cells were corrected",
    "midnight-paper-cls-2025": "CLS; rows of the Midnight paper, quoted in a table of others",
    "openmidnight-clsmean-2026-05": "CLS+mean; OpenMidnight's high-resolution report",
    "openmidnight-cls-2026-04": "CLS; OpenMidnight's fine-tuning guide",
    "openmidnight-cls-2025-11": "CLS; OpenMidnight's first table",
    "hest-pca256-ridge-2024-08": "PCA to 256, ridge; mean Pearson of 50 genes over the official splits",
    "midnight-hest-2025": "CLS+mean; HEST's ridge, run by Midnight's authors",
    "hoptimus0-linear-2024": "linear probe, three folds over epochs 1 to 100; plain accuracy",
}  # fmt: skip
# Nearest first. An embedding is the larger difference: rows of the other one come after all of these.
NEAREST = {
    "cls": (
        "eva-2025-03", "eva-2024-11-adamw", "eva-2024-10-adamw", "eva-2024-10-sgd-smallwsi", "eva-2024-09-sgd-fullwsi",
        "eva-2024-03-sgd", "midnight-paper-cls-2025", "openmidnight-cls-2026-04", "openmidnight-cls-2025-11",
    ),
    "cls+mean": ("midnight-fork-2025", "openmidnight-clsmean-2026-05", "midnight-fork-2025-v1"),
    "": ("hest-pca256-ridge-2024-08", "midnight-hest-2025", "hoptimus0-linear-2024"),
}  # fmt: skip
METRICS = {  # our name -> the file's; a pooled Dice or an AUROC over other classes has no published counterpart
    "balanced_accuracy": "balanced_accuracy",
    "accuracy": "accuracy",
    "auroc": "auroc",
    "macro_f1": "macro_f1",
    "pearson": "pearson",
    "monai_dice": "monai_dice_no_bg",
    "monai_dice_no_bg": "monai_dice_no_bg",
}
TASKS = {"hest_lung": "hest_luad", "hest": "hest_avg9", "gleason_arvaniti": "gleason", "crc_norm": "crc"}
OTHER_DEFINITION = {"tp53": "tp53_tcga_patch"}  # a published task of the same name whose cohort and split are not known

# Public weights -> the name that the published rows give them.
SAME_WEIGHTS = {
    "owkin/phikon": "Phikon",
    "owkin/phikon-v2": "Phikon-v2",
    "kaiko-ai/midnight": "Midnight-12k",
    "mahmoodlab/uni": "UNI",
    "mahmoodlab/uni2-h": "UNI2-h",
    "bioptimus/h-optimus-0": "H-optimus-0",
    "bioptimus/h-optimus-1": "H-optimus-1",
    "bioptimus/h0-mini": "H0-mini",
    "paige-ai/virchow": "Virchow",
    "paige-ai/virchow2": "Virchow2",
    "prov-gigapath/prov-gigapath": "Prov-GigaPath",
    "histai/hibou-b": "Hibou-B",
    "histai/hibou-l": "Hibou-L",
    "1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms": "kaiko ViT-S/16",
    "1aurent/vit_small_patch8_224.kaiko_ai_towards_large_pathology_fms": "kaiko ViT-S/8",
    "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms": "kaiko ViT-B/16",
    "1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms": "kaiko ViT-B/8",
    "1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms": "kaiko ViT-L/14",
    "1aurent/vit_small_patch16_224.lunit_dino": "Lunit ViT-S/16",
}


class PublishedError(ValueError):
    """The file of published scores is not what it should be; the message names the line."""


@dataclass(frozen=True)
class Published:
    """One published number. value: None where the source has none. sd: what its source calls its spread, None where not stated.

    embedding: the file's words (`CLS`, `CLS+mean`, `patch tokens`, …), "" where not stated. split: `val_selected` means that the
    checkpoint was selected on the split that is reported; "" where not stated. protocol: an id, which `PROTOCOLS` explains.
    """

    source: str
    model: str
    pretraining: str
    embedding: str
    task: str
    split: str
    metric: str
    value: float | None
    sd: float | None
    protocol: str

    @property
    def floor(self) -> bool:
        """An untrained network or plain colour."""
        return self.pretraining == "none"

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know before believing it: none, or some of the words below."""
        source, found = self.source.lower(), []
        if self.value is None:
            found.append("no value")
        if self.split == "val_selected":
            found.append("selected on the reported split")
        if not self.split:
            found.append("split not stated")
        if "unverified" in source or "unverified" in self.metric:
            found.append("unverified")
        if "quoted" in source or "third-party" in source or "secondary" in source:
            found.append("secondary source")
        if "recomputed" in source:
            found.append("mean of rounded cells")
        if "lower bound" in source:
            found.append("lower bound")
        if "author" in self.protocol or "user run" in source:
            found.append("run by its authors or a user")
        return tuple(found)


@cache
def published_scores() -> tuple[Published, ...]:
    """Every row that the project ships, in the order of the file."""
    return read_published(resources.files("histoscale.eval").joinpath(FILE).read_text(encoding="utf-8"))


def read_published(text: str) -> tuple[Published, ...]:
    """The rows of a CSV with the columns of `COLUMNS`. Raises PublishedError for other columns, or a value that is no number."""
    lines = csv.DictReader(text.splitlines())
    if tuple(lines.fieldnames or ()) != COLUMNS:
        have = ", ".join(lines.fieldnames or ())
        raise PublishedError(f"published scores have the columns {have}: expected {', '.join(COLUMNS)}")
    return tuple(_row(line, lines.line_num) for line in lines)


def _row(line: dict[str, str], number: int) -> Published:
    if None in line or None in line.values():
        raise PublishedError(f"published scores, line {number}: expected {len(COLUMNS)} fields")
    texts = {name: line[name].strip() for name in COLUMNS}
    for name in ("source", "model", "task", "metric", "protocol_version"):
        if not texts[name]:
            raise PublishedError(f"published scores, line {number}: {name} is empty; every number needs it")
    value, sd = (_number(texts.pop(name), name, number) for name in ("value", "sd"))
    return Published(value=value, sd=sd, protocol=texts.pop("protocol_version"), **texts)


def _number(text: str, name: str, line: int) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        raise PublishedError(f"published scores, line {line}: {name} is {text!r}, expected a number or nothing") from None
    return value if math.isfinite(value) else None


def task_of(dataset: str, probe: str = "") -> str:
    """The file's name of one of our sets: `hest/IDC` -> `hest_idc`, `pcam` with `few_shot/10` -> `pcam_10shot`."""
    name = dataset.lower().replace("/", "_").replace("-", "_")
    shots = probe.removeprefix("few_shot/") if probe.startswith("few_shot/") else ""
    name = TASKS.get(name, name)
    return f"{name}_{shots}shot" if shots and not name.endswith("shot") else name


def same_weights(encoder: str) -> str | None:
    """The published name of the very weights that an encoder was opened from, None where they are not known."""
    name = encoder.lower()
    for prefix in ("hf:", "timm:", "hf-hub:", "hf_hub:"):
        name = name.removeprefix(prefix)
    return SAME_WEIGHTS.get(name)


def published_beside(
    dataset: str, probe: str, role: str, metric: str, embedding: str, rows: Sequence[Published] | None = None
) -> list[Published]:
    """Published rows of the same task and metric, the nearest protocol first, and inside one the highest value first.

    role: of our rows. `report` and `outer` stand beside a protocol's test split, or beside its only split; `select` beside the
    split that was selected on where there is a test besides; nothing stands beside `external`. Few-shot scores have counterparts
    with equal shots, neighbours and prototypes none. rows: others than the shipped ones. Empty where nothing was published.
    """
    theirs = METRICS.get(metric)
    task = task_of(dataset, probe)
    if theirs is None or probe in ("knn", "prototype") or role == "external":
        return []
    table = published_scores() if rows is None else rows
    found = [row for row in table if row.task == task and row.metric == theirs and row.value is not None]
    tested = {row.protocol for row in found if row.split == "test"}
    if role == "select":
        found = [row for row in found if row.protocol in tested and row.split == "val_selected"]
    else:
        found = [row for row in found if row.protocol not in tested or row.split == "test"]
    order = nearest_protocols(embedding)
    return sorted(found, key=lambda row: (order.get(row.protocol, len(order)), row.protocol, -(row.value or 0.0)))


def nearest_protocols(embedding: str) -> dict[str, int]:
    """Protocol id -> its place, nearest first, for one of our embeddings (`cls`, `cls+mean`, `patch`, …)."""
    first = embedding if embedding in NEAREST else "cls"
    names = [*NEAREST[first], *(name for key, block in NEAREST.items() if key != first for name in block)]
    return {name: place for place, name in enumerate(names)}


def other_definition(dataset: str) -> str:
    """Why published rows of the same name are not shown, "" where there is no such case."""
    task = OTHER_DEFINITION.get(task_of(dataset).split("_v")[0])
    return f"{task} was published with a cohort and a split that are not known: no parity is claimed" if task else ""


def nearest_column(rows: Sequence[Published], most: int, encoders: Sequence[str]) -> list[Published]:
    """What is shown of `published_beside`: of the nearest protocol the best `most`, its floors, and the very weights of ours."""
    first = [row for row in rows if row.protocol == rows[0].protocol and row.embedding == rows[0].embedding]
    models = {same_weights(encoder) for encoder in encoders}
    ranked = [row for row in first if not row.floor]
    return [row for row in ranked if row in ranked[:most] or row.model in models] + [row for row in first if row.floor]
