"""eva's own fit beside protocol=eva on the same embeddings: scores, seconds, and eva's metrics beside ours.

    uv venv EVA && uv pip install --python EVA/bin/python kaiko-eva==0.4.5 jsonargparse==4.31 scipy
    PYTHONPATH=.ns EVA/bin/python tests/oracle_eva.py OUT [set=mhist] [runs=2] [workers=4] [threads=1] [steps=12500] [memory=no]

OUT takes the embeddings as eva reads them (manifest.csv and a .pt file a row) and result-SET.json. Sets: SETS below.
memory=yes keeps what eva has read, so that its scores come sooner; its seconds are then not its own.
"""

import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from histoscale.eval.eva import EvaConfig, patience, train_heads
from histoscale.eval.scores.classification import auroc_one_vs_rest, balanced_accuracy, macro_f1

ROOT = Path(__file__).resolve().parents[1]
SETS = {"mhist": (2175, 977, 2), "crc_small": (12_000, 2_000, 9), "tiny": (600, 300, 3)}  # train, validation = report, classes
WIDTH = 384


def embeddings(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [n, D] with a decaying spectrum, as embeddings have; labels [n]; train bool [n]. Classes overlap."""
    train, held, classes = SETS[name]
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, train + held, p=[0.3, 0.7] if classes == 2 else None)
    spectrum = (1 + np.arange(WIDTH)) ** -0.5
    centres = rng.normal(size=(classes, WIDTH)) * spectrum * (0.1 if classes == 2 else 0.2)
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    x = (rng.normal(size=(len(labels), WIDTH)) * spectrum + centres[labels]) @ turn * 3
    return x.astype(np.float32), labels, np.arange(len(labels)) < train


def write(folder: Path, x: np.ndarray, labels: np.ndarray, train: np.ndarray) -> None:
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    lines = ["origin,embeddings,target,split"]
    for row, vector in enumerate(x):
        torch.save(torch.from_numpy(vector[None].copy()), folder / f"embeddings/{row}.pt")
        lines.append(f"{row}.png,embeddings/{row}.pt,{labels[row]},{'train' if train[row] else 'val'}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def metrics_of(classes: int) -> Any:
    import eva as package

    kinds = package.metrics
    return kinds.BinaryClassificationMetrics() if classes == 2 else kinds.MulticlassClassificationMetrics(classes)


def as_float(target: torch.Tensor) -> torch.Tensor:
    return target.float()  # its configuration has torchvision's ToDtype here


def config_of(runs: int, steps: int) -> EvaConfig:
    values = yaml.safe_load((ROOT / "configs/eva/default.yaml").read_text())
    return EvaConfig(**{**values, "betas": tuple(values["betas"]), "runs": runs, "steps": steps})


def theirs(folder: Path, classes: int, waiting: int, config: EvaConfig, workers: int, memory: bool) -> list[dict[str, float]]:
    """What its trainer, early stopping and checkpoint say, a run each: its offline configuration written out."""
    import eva as package
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    binary = classes == 2
    monitor = "val/BinaryBalancedAccuracy" if binary else "val/MulticlassAccuracy"
    target = as_float if binary else None
    pl.seed_everything(42, workers=True)

    class Kept(package.datasets.EmbeddingsClassificationDataset):  # type: ignore[misc, name-defined]
        @cache  # noqa: B019
        def load_embeddings(self, index: int) -> torch.Tensor:
            return super().load_embeddings(index)

    def dataset(split: str) -> Any:
        kind = Kept if memory else package.datasets.EmbeddingsClassificationDataset
        return kind(str(folder), "manifest.csv", split, target_transforms=target)

    def loader(shuffle: bool) -> Any:
        more = {"num_workers": workers, "persistent_workers": workers > 0, "prefetch_factor": 2 if workers else None}
        return package.DataLoader(batch_size=256, shuffle=shuffle, **more)

    data = package.DataModule(
        datasets=package.core.data.datamodules.schemas.DatasetsSchema(train=dataset("train"), val=dataset("val")),
        dataloaders=package.core.data.datamodules.schemas.DataloadersSchema(train=loader(True), val=loader(False)),
    )
    metrics = metrics_of(classes)
    head = {"class_path": "torch.nn.Linear", "init_args": {"in_features": WIDTH, "out_features": 1 if binary else classes}}
    model = package.HeadModule(
        head=head,
        criterion=torch.nn.BCEWithLogitsLoss() if binary else torch.nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        metrics=package.core.metrics.structs.MetricsSchema(common=[package.metrics.AverageLoss(), metrics]),
    )
    trainer = package.Trainer(
        n_runs=config.runs, max_steps=config.steps, accelerator="cpu", devices=1, default_root_dir=str(folder / "logs"),
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(filename="best", save_last=False, save_top_k=1, monitor=monitor, mode="max"),
            EarlyStopping(min_delta=0, patience=waiting, monitor=monitor, mode="max"),
        ],
    )  # fmt: skip
    trainer.run_evaluation_session(model, data)
    (found,) = sorted((folder / "logs").glob("*/results.json"), key=lambda path: path.stat().st_mtime)[-1:]
    values = {name: row["values"] for name, row in json.loads(found.read_text())["metrics"]["val"][0].items()}
    return [{name: row[run] for name, row in values.items()} for run in range(config.runs)]


def main(out: Path, options: dict[str, str]) -> dict[str, Any]:
    name, runs, workers = options.get("set", "mhist"), int(options.get("runs", "2")), int(options.get("workers", "4"))
    torch.set_num_threads(int(options.get("threads", "1")))
    folder, classes = out / name, SETS[name][2]
    x, labels, train = embeddings(name)
    if not (folder / "manifest.csv").exists():
        write(folder, x, labels, train)
    config = config_of(runs, int(options.get("steps", "12500")))
    start = time.perf_counter()
    heads = train_heads(x[train], labels[train], x[~train], labels[~train], classes, config, "cpu")
    ours = time.perf_counter() - start
    logs, truth = heads.log_probabilities(x[~train]), labels[~train]
    scores = [balanced_accuracy(truth, row.argmax(1), classes) for row in logs]
    start = time.perf_counter()
    found = theirs(folder, classes, patience(config, int(train.sum())), config, workers, options.get("memory") == "yes")
    its = time.perf_counter() - start
    key = "val/BinaryBalancedAccuracy" if classes == 2 else "val/MulticlassAccuracy"
    result = {
        "set": name, "runs": runs, "memory": options.get("memory", "no"),
        "eva_seconds": its, "our_seconds": ours, "ratio": its / ours,
        "eva": [row[key] for row in found], "ours": scores, "our_epochs": heads.epoch.tolist(),
        "difference_of_means": float(np.mean(scores) - np.mean([row[key] for row in found])),
        "metrics": metrics_beside(np.exp(logs[0]), truth, classes),
    }  # fmt: skip
    (out / f"result-{name}.json").write_text(json.dumps(result, indent=2))
    return result


def metrics_beside(probabilities: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, tuple[float, float]]:
    """(eva's, ours) of the same probabilities [n, K]. eva's binary F1 is of the positive class, so it is left out."""
    binary = classes == 2
    metrics = metrics_of(classes)
    given = torch.from_numpy(probabilities[:, 1] if binary else probabilities)
    its = {k: float(v) for k, v in metrics(given, torch.from_numpy(truth)).items()}
    predicted = probabilities.argmax(1)
    found = {"accuracy": (its["BinaryBalancedAccuracy" if binary else "MulticlassAccuracy"],
                          balanced_accuracy(truth, predicted, classes))}  # fmt: skip
    found["auroc"] = (its["BinaryAUROC" if binary else "MulticlassAUROC"], auroc_one_vs_rest(probabilities, truth))
    if not binary:
        found["f1"] = (its["MulticlassF1Score"], macro_f1(truth, predicted, classes))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), dict(text.split("=", 1) for text in sys.argv[2:])), indent=2))
