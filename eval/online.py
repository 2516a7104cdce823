"""What is the teacher worth on a labelled set while it trains? kNN and a linear probe at intervals, beside an untrained encoder.

A watcher of the trainer: every rank embeds its share of the patches and tries its share of the penalties, so none waits for
another. It reads weights and changes nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from histoscale.data.journal import Journal
from histoscale.data.keys import key
from histoscale.data.ranks import Ranks
from histoscale.eval.architecture import Architecture, untrained
from histoscale.eval.datasets.opening import AnyDataset
from histoscale.eval.datasets.patches import DatasetError, LabelledPatches, hash_of
from histoscale.eval.encoder import tokens_of
from histoscale.eval.floors import FLOOR_POOLS, Calls, better
from histoscale.eval.knn import knn_on_features
from histoscale.eval.logistic import Rows, Standard
from histoscale.eval.pool import check_pool, patch_mean, pooled
from histoscale.eval.probe import ProbeConfig, choose_penalty, fit_final, inner_folds, try_penalties
from histoscale.eval.resolution import LevelConfig
from histoscale.eval.scores.interval import IntervalConfig, paired_difference, patient_bootstrap

PROBES = ("linear", "knn")
LAST = 3  # probes at the end of a run whose mean is its score: one alone is noisy


@dataclass(frozen=True)
class OnlineConfig:
    """dataset: `train` is learnt from, `report` is scored, `external` is left alone. patches: at most so many of both together.
    catalog: of the labelled slides, null for the one that is trained on. batch: patches a forward. initialisations: untrained
    encoders of the floor, 0 for none."""

    dataset: AnyDataset
    catalog: str | None
    patches: int
    batch: int
    initialisations: int
    grid: LevelConfig
    probe: ProbeConfig
    interval: IntervalConfig


class Online:
    """The watcher. Called with the teacher's backbone and the steps done, at every `every`-th step, at 0 and at the last one."""

    def __init__(
        self,
        patches: LabelledPatches,
        architecture: Architecture,
        precision: str,
        config: OnlineConfig,
        every: int,
        steps: int,
        journal: Journal,
        ranks: Ranks,
    ) -> None:
        check_pool(config.probe.pool)
        if every < 1:
            raise ValueError(f"monitor.labelled_every is {every}: expected at least 1 step")
        if patches.size_px is None or patches.usage.choose == "outer":
            raise DatasetError(
                f"{patches.name} cannot be probed while it trains: expected images of one square size in train and report, found "
                f"{'images of several sizes' if patches.size_px is None else 'no part to report'}; use `histoscale probe`"
            )
        self.patches = chosen_patches(patches, config.patches, config.probe.seed)
        self.architecture, self.precision, self.config, self.ranks = architecture, precision, config, ranks
        self.every, self.steps, self.journal, self.folder = every, steps, journal, journal.out / "online"
        self.train, self.report = self.patches.rows("train"), self.patches.rows("report")
        self.identity = hash_of(self.patches.hash, precision, config.probe, architecture)
        self._share: Tensor | None = None  # this rank's pixels, read once
        self._floors: dict[str, Calls] | None = None

    def __call__(self, backbone: nn.Module, step: int) -> dict[str, float]:
        """Balanced accuracies `online/linear`, `online/knn`, and how far above the floor; {} at other steps. All ranks call."""
        if step % self.every and step != self.steps:
            return {}
        start = perf_counter()
        calls = self.probe(backbone, [self.config.probe.pool])
        self._keep(f"step-{step}", calls)
        truth = self.patches.labels[self.report]
        row = {f"online/{name}": calls[name, self.config.probe.pool].balanced_accuracy(truth) for name in PROBES}
        floor = self.floor()
        row |= {f"online/{name}_above_random": row[f"online/{name}"] - floor[name].balanced_accuracy(truth) for name in floor}
        row["online/seconds"] = perf_counter() - start
        if step == 0:
            patients = len(set(self.patches.patients[self.report]))
            above = f" (untrained {row['online/knn'] - row['online/knn_above_random']:.3f})" if floor else ""
            self.journal.say(
                f"step 0: kNN {row['online/knn']:.3f}{above} on {self.patches.name}, {len(self.report)} patches of {patients} "
                f"{self.patches.groups}s, {len(self.patches.classes)} classes; weights that did not load look untrained"
            )
        return row

    def probe(self, backbone: nn.Module, pools: Sequence[str]) -> dict[tuple[str, str], Calls]:
        """Decisions of both probes on the rows of `report`, by (probe, pool); every rank must call it."""
        cls, mean = self._features(backbone)
        found = {}
        for pool in pools:
            x = pooled(cls, mean, pool).numpy()
            for name, logs in zip(PROBES, (self._linear(x), self._knn(x)), strict=True):
                found[name, pool] = Calls(logs[None], pool)
        return found

    def _features(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        """cls [n, D] and mean of the patch tokens [n, D] of all patches, float32 on the CPU, the same on every rank."""
        count = -(-len(self.patches) // self.ranks.world)  # equal shares, as sharded weights need equal numbers of forwards
        if self._share is None:
            rows = np.arange(self.ranks.rank * count, (self.ranks.rank + 1) * count) % len(self.patches)
            parts = [self.patches.read(rows[i : i + self.config.batch]) for i in range(0, count, self.config.batch)]
            self._share = torch.from_numpy(np.concatenate(parts))
        tokens = tokens_of(backbone, self.architecture, self.ranks.device, self.precision)
        made = []
        with torch.inference_mode():
            for pixels in self._share.split(self.config.batch):
                cls, patches = tokens(pixels.to(self.ranks.device))
                made.append(torch.stack([cls.float(), patch_mean(patches.float())], 1))
        whole = self.ranks.concat(torch.cat(made).cpu().clone())[: len(self.patches)]
        return whole[:, 0], whole[:, 1]

    def _linear(self, x: np.ndarray) -> np.ndarray:
        """Log-probabilities [report, K]; the penalty is chosen among the training patients, each rank trying a part of them."""
        config, labels, classes = self.config.probe, self.patches.labels[self.train], len(self.patches.classes)
        standard = Standard.of(x[self.train])
        known = Rows.of(x[self.train], standard, "cpu")
        outside = inner_folds(labels, self.patches.patients[self.train], config.folds, config.seed, "online.probe.folds")
        mine = sorted(config.penalties, reverse=True)[self.ranks.rank :: self.ranks.world]
        tried = try_penalties(known, labels, classes, outside, None, mine, config)[0] if mine else []
        penalty, _ = choose_penalty([row for part in self.ranks.objects(tried) for row in part], config.penalties)
        weights, bias = fit_final(known, labels, classes, penalty, config)[0].weights(known)
        logits = standard(x[self.report]) @ weights[0] + bias[0]
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def _knn(self, x: np.ndarray) -> np.ndarray:
        config, labels, classes = self.config.probe, self.patches.labels[self.train], len(self.patches.classes)
        return knn_on_features(x[self.train], labels, classes, x[self.report], config.neighbours, config.temperature)

    def floor(self) -> dict[str, Calls]:
        """Untrained encoders with the better of the pools, by probe; made once a run. {} without initialisations."""
        if self._floors is not None or not self.config.initialisations:
            return self._floors or {}
        truth = self.patches.labels[self.report]
        numbers = range(self.config.initialisations)
        names = [f"random-{number}" for number in numbers]
        if not all(self.ranks.objects(all(self._kept(name) is not None for name in names))):
            for number, name in zip(numbers, names, strict=True):
                model = untrained(self.architecture, number).to(self.ranks.device)
                self._keep(name, self.probe(model, FLOOR_POOLS))
            self.ranks.barrier()  # rank 0 has written what all now read
        kept = [self._kept(name) or {} for name in names]
        every = {(name, pool): Calls(np.concatenate([one[name, pool].logs for one in kept]), pool)
                 for name in PROBES for pool in FLOOR_POOLS}  # fmt: skip
        self._floors = {name: better([every[name, pool] for pool in FLOOR_POOLS], truth) for name in PROBES}
        return self._floors

    def _keep(self, name: str, calls: dict[tuple[str, str], Calls]) -> None:
        if not self.ranks.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.npz"
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            arrays: dict[str, Any] = {f"{probe} {pool}": one.logs.astype(np.float32) for (probe, pool), one in calls.items()}
            np.savez(file, identity=np.array(self.identity), **arrays)
        partial.replace(path)

    def _kept(self, name: str) -> dict[tuple[str, str], Calls] | None:
        """What `_keep` wrote, unless it is of other patches or probes: they are speed keys, and may change in mid-run."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as held:
            if str(held["identity"]) != self.identity:
                return None
            cells = [tuple(cell.split(" ")) for cell in held.files if cell != "identity"]
            return {(probe, pool): Calls(held[f"{probe} {pool}"].astype(np.float64), pool) for probe, pool in cells}

    def summary(self) -> dict[str, Any]:
        """Every point, and the mean of the last three with its paired difference to the floor; one line of it is said.

        Points were kept as files, so a run that was stopped and continued has all of them. Rank 0 alone needs it.
        """
        pool, truth = self.config.probe.pool, self.patches.labels[self.report]
        steps = sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.npz"))
        points = {step: calls for step in steps if (calls := self._kept(f"step-{step}")) is not None}
        floor, patients = self.floor(), self.patches.patients[self.report]
        found: dict[str, Any] = {
            "dataset": self.patches.name,
            "data_hash": self.patches.hash,
            "pool": pool,
            "patches": {"train": len(self.train), "report": len(self.report)},
            "groups": self.patches.groups,
            "steps": list(points),
        }
        for name in PROBES if points else ():
            values = [calls[name, pool].balanced_accuracy(truth) for calls in points.values()]
            last = Calls(np.concatenate([calls[name, pool].logs for calls in list(points.values())[-LAST:]]), pool)
            row: dict[str, Any] = {
                "points": values,
                "spearman": float(spearmanr(list(points), values).statistic) if len(set(values)) > 2 else None,
                "last": patient_bootstrap(last.statistic(truth), patients, self.config.interval).as_dict(),
            }
            if floor:
                row["random"] = floor[name].balanced_accuracy(truth)
                difference = paired_difference(
                    last.statistic(truth), floor[name].statistic(truth), patients, self.config.interval
                )
                row["last_minus_random"] = difference.as_dict()
                self.journal.say(
                    f"{self.patches.name}, {name} probe: mean of the last {len(last.logs)} {row['last']['value']:.3f}, untrained "
                    f"{row['random']:.3f}, difference {difference} over {difference.patients} {self.patches.groups}s"
                )
            found[name] = row
        return found


def chosen_patches(patches: LabelledPatches, most: int, seed: int) -> LabelledPatches:
    """At most `most` of train and report, half each, dealt out evenly over classes and patients by keys of their places.

    Raises DatasetError for fewer than two.
    """
    if most < 2:
        raise DatasetError(f"online.patches is {most}: expected at least 2, one to learn from and one to score")
    kept = []
    for role in ("train", "report"):
        rows = patches.rows(role)
        order = sorted(rows.tolist(), key=lambda row: key(seed, f"online/{role}", row))
        dealt: dict[tuple[str, int], int] = {}
        turns: list[tuple[int, int, int]] = []
        for row in order:
            cell = str(patches.patients[row]), int(patches.labels[row])
            turns.append((dealt.get(cell, 0), len(turns), row))
            dealt[cell] = dealt.get(cell, 0) + 1
        kept += [row for _, _, row in sorted(turns)[: most // 2]]
    return patches.only(np.array(sorted(kept)))
