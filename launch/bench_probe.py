"""Probes on given features: the linear probe with its selection beside scikit-learn, protocol=eva beside a plain loop."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from histoscale.data.journal import Journal
from histoscale.eval.eva import EvaConfig, train_heads
from histoscale.eval.probe import LinearProbe, fit_linear

if TYPE_CHECKING:
    from histoscale.launch.bench import Config


@dataclass(frozen=True)
class ProbedConfig:
    """rows, width, classes, blocks: of drawn features for the linear probe. signal: of the class means. eva_rows, eva_select,
    eva_classes: rows that a head learns from and is chosen on. sklearn: whether to fit it too, which can take minutes."""

    rows: int
    width: int
    classes: int
    blocks: int
    signal: float
    eva_rows: int
    eva_select: int
    eva_classes: int
    sklearn: bool


def probe(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print, and return seconds (wall and CPU) and ratios: medians over rounds whose order is shuffled.

    The plain loop is eva's less its reading of a file a row: a module, an optimiser and a fit for each run. Neither it nor
    protocol=eva stops early here, so that both do all steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = config.probed
    x, labels, blocks = drawn(size.rows, size.width, size.classes, size.blocks, size.signal, config.seed)
    heads, heads_labels, _ = drawn(
        size.eva_rows + size.eva_select, size.width, size.eva_classes, size.blocks, size.signal, config.seed
    )
    eva = replace(config.eva, patience_share=1.0)
    parts = heads[: size.eva_rows], heads_labels[: size.eva_rows], heads[size.eva_rows :], heads_labels[size.eva_rows :]
    fitted: dict[str, LinearProbe] = {}

    def linear() -> None:
        fitted["linear"] = fit_linear(x, labels, size.classes, blocks, config.probe, device=device)

    def scikit() -> None:
        from sklearn.linear_model import LogisticRegression  # not at the top: workers of other benches would carry it

        ours = fitted["linear"]
        z, half = ours.standard(x).astype(np.float32), 2 if size.classes == 2 else 1
        LogisticRegression(C=half / (ours.penalty * len(x)), tol=config.probe.tolerance, max_iter=1000).fit(z, labels)

    methods: dict[str, Callable[[], object]] = {"linear": linear}
    if size.sklearn:
        methods["sklearn"] = scikit
    methods["eva"] = lambda: train_heads(*parts, size.eva_classes, eva, device)
    methods["plain"] = lambda: plain(*parts, size.eva_classes, eva, device)
    times = _measure(methods, config.rounds, config.seed, journal)
    found = {name: {"wall": _spread(rows[:, 0]), "cpu": _spread(rows[:, 1])} for name, rows in times.items()}
    ratios = {f"{b} / {a}": float(np.median(times[b][:, 0] / times[a][:, 0]))
              for a, b in (("linear", "sklearn"), ("eva", "plain")) if b in times}  # fmt: skip
    chosen = fitted["linear"]
    what = f"{size.rows} x {size.width}, {size.classes} classes, {len(chosen.inner)} penalties x {config.probe.folds} folds"
    lines = [f"seconds on {device.type}, {torch.get_num_threads()} threads, median of {config.rounds} rounds (CPU seconds)"]
    lines += [f"  {name:8} {row['wall']['median']:8.2f}   ({row['cpu']['median']:.2f})" for name, row in found.items()]
    lines += [f"  linear: {what}, {chosen.evaluations} passes, penalty {chosen.penalty:g}"]
    lines += [f"  eva: {eva.runs} runs of {eva.steps} steps on {size.eva_rows} rows, {size.eva_classes} classes"]
    lines += [f"  {name}: {ratio:.2f}" for name, ratio in ratios.items()]
    journal.say("\n".join(lines))
    return {
        "device": device.type, "threads": torch.get_num_threads(), "seconds": found, "ratios": ratios,
        "penalty": chosen.penalty, "passes": chosen.evaluations, "tried": chosen.inner,
    }  # fmt: skip


def drawn(n: int, width: int, classes: int, blocks: int, signal: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features float32 [n, D] with a spectrum that falls as 1 / k, as that of embeddings; labels [n]; blocks [n].

    One label in a hundred is random.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, width + 1) ** -0.5
    spectrum = spectrum / spectrum.norm() * width**0.5
    labels = torch.randint(classes, (n,), generator=generator)
    block = torch.randint(blocks, (n,), generator=generator)
    means = torch.randn(classes, width, generator=generator) * signal * spectrum.sqrt()
    shifts = torch.randn(blocks, width, generator=generator) * spectrum / 2
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    x = torch.empty(n, width)
    for start in range(0, n, 8192):
        part = slice(start, start + 8192)
        noise = torch.randn(len(labels[part]), width, generator=generator) * spectrum
        x[part] = (noise + means[labels[part]] + shifts[block[part]]) @ turn
    wrong = torch.rand(n, generator=generator) < 0.01
    labels[wrong] = torch.randint(classes, (int(wrong.sum()),), generator=generator)
    return x.numpy(), labels.numpy(), block.numpy()


def plain(
    train: np.ndarray,
    labels: np.ndarray,
    select: np.ndarray,
    select_labels: np.ndarray,
    classes: int,
    config: EvaConfig,
    device: torch.device,
) -> list[float]:
    """The best accuracy of each run by torch's own modules, a run after the other."""
    x, v = (torch.from_numpy(part).to(device) for part in (train, select))
    y, t = (torch.from_numpy(part).to(device) for part in (labels, select_labels))
    loss = nn.CrossEntropyLoss() if classes > 2 else nn.BCEWithLogitsLoss()
    found = []
    for run in range(config.runs):
        torch.manual_seed(run)
        head = nn.Linear(x.shape[1], classes if classes > 2 else 1).to(device)
        optimiser = torch.optim.AdamW(head.parameters(), config.lr, config.betas, config.eps, config.weight_decay)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, config.slow_factor, config.slow_epochs)
        best = 0.0
        for _ in range(config.steps // -(-len(x) // config.batch)):
            for batch in torch.randperm(len(x)).to(device).split(config.batch):
                optimiser.zero_grad()
                logits = head(x[batch]).squeeze(-1)
                loss(logits, y[batch] if classes > 2 else y[batch].float()).backward()
                optimiser.step()
            schedule.step()
            with torch.inference_mode():
                logits = head(v).squeeze(-1)
                best = max(best, float(((logits.argmax(1) if classes > 2 else logits > 0) == t).float().mean()))
        found.append(best)
    return found


def _measure(methods: dict[str, Callable[[], object]], rounds: int, seed: int, journal: Journal) -> dict[str, np.ndarray]:
    """Seconds [rounds, (wall, CPU)] by method. The first round runs in the given order, since some use what others found."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    order, shuffle = list(methods), random.Random(seed)
    with journal.progress(rounds * len(order), "rounds", "fits") as progress:
        for _ in range(rounds):
            for name in order:
                wall, cpu = time.perf_counter(), time.process_time()
                methods[name]()
                _settle()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
                progress.advance(1)
            shuffle.shuffle(order)
    return {name: np.array(rows) for name, rows in times.items()}


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}
