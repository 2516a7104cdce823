"""A training step: milliseconds by part, and how the plainest correct implementation compares, in shuffled rounds of one run."""

import gc
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch

from histoscale.data.journal import Journal
from histoscale.data.keys import key, permutation
from histoscale.data.plan import Plan
from histoscale.data.ranks import Ranks, open_ranks
from histoscale.data.storage import Store
from histoscale.data.stream import Batch, Stream
from histoscale.data.views import make_views
from histoscale.launch import pretrain
from histoscale.launch.bench_read import draw_slide
from histoscale.launch.config import load
from histoscale.launch.precision import settled
from histoscale.pretrain.backbone import timm_arguments
from histoscale.pretrain.flops import flops_a_patch
from histoscale.pretrain.meter import PARTS
from histoscale.pretrain.methods import DinoConfig, build, masks_at, scheduled
from histoscale.pretrain.optim import lr_at, weight_decay_at
from histoscale.pretrain.trainer import TrainConfig
from histoscale.pretrain.trainer import train as run_trainer

if TYPE_CHECKING:
    from histoscale.launch.bench import Config

SHARED = ("teacher", "student", "losses", "backward", "optimiser", "ema")  # parts that the plain step has too
PLAIN = Path(__file__).resolve().parents[1] / "tests" / "plain_step.py"
Times = dict[str, float]  # milliseconds a step, by part


def train(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print the table, and return it: medians over rounds in milliseconds a step, and the ratio of plain to ours.

    Both take the same patches in the same order, and start a round from the same weights. The ratio is over the parts that both
    have: reading and views are the same for them. Raises ValueError for steps that leave nothing to time.
    """
    if config.train.steps < 1 or config.rounds < 1:
        raise ValueError(f"train.steps is {config.train.steps} and rounds is {config.rounds}: expected at least 1 of each")
    store = Store(config.storage)
    catalog = config.catalog
    if catalog is None:
        draw_slide(config, store, journal)
        catalog = str(journal.out / "slide" / "catalog")
    given = [f"recipe={config.train.recipe}", *config.train.overrides, f"catalog={catalog}", f"out={journal.out}"]
    composed, decided = settled(load("pretrain", given), None)
    if decided:
        journal.say(decided)
    wanted: pretrain.Config = composed.config
    wanted = replace(wanted, schedule=replace(wanted.schedule, steps=max(wanted.schedule.steps, config.train.steps + 1)))
    ranks = open_ranks(wanted.hardware.device, wanted.hardware.timeout_s)
    opened = pretrain.open_source(wanted, journal)
    plan = Plan(wanted.seed, wanted.optim.global_batch, wanted.sampler, opened.table)
    quiet = Journal(journal.out, replace(config.logging, progress="off"), journal.main)

    def batches(start: int) -> Stream:
        return Stream(plan, opened.source, wanted.stream, ranks.rank, ranks.world, start, journal.path("lost.jsonl"))

    missing = _no_plain(config, wanted, ranks)
    methods: dict[str, Callable[[int], Times]] = {"ours": lambda turn: _ours(wanted, config.train.steps, batches, quiet, ranks)}
    if not missing:
        plain = _load(PLAIN)
        methods["plain"] = lambda turn: _plain(plain, wanted, config.train.steps, batches, ranks)
    rounds: dict[str, list[Times]] = {name: [] for name in methods}
    names = list(methods)
    peaks = dict.fromkeys(names, 0.0)
    with journal.progress(config.rounds * len(names), "bench", "measurements") as progress:
        for turn in range(config.rounds):
            for i in permutation(key(config.seed, "bench round", turn), len(names)):
                _forget_peak(ranks)
                rounds[names[i]].append(methods[names[i]](turn))
                peaks[names[i]] = max(peaks[names[i]], _peak_gb(ranks))
                progress.advance(1, method=names[i])

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **_versions(),
        "recipe": config.train.recipe,
        "overrides": config.train.overrides,
        "batch": wanted.optim.global_batch,
        "precision": wanted.precision,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolution": torch.backends.cudnn.allow_tf32},
        "gflops_a_patch": flops_a_patch(wanted.model, wanted.method, wanted.views) / 1e9,
        "ms": {part: _spread([one[part] for one in rounds["ours"]]) for part in PARTS},
        "step_ms": _spread([sum(one.values()) for one in rounds["ours"]]),
        "no_plain": missing,
    }
    if ranks.device.type == "cuda":
        found["peak_gb"] = peaks
    found["patches_per_s"] = wanted.optim.global_batch / found["step_ms"]["median"] * 1000
    found["tflops_per_device"] = found["gflops_a_patch"] * found["patches_per_s"] / ranks.world / 1000
    peak = wanted.monitor.peak_tflops
    found["mfu"] = None if peak is None else found["tflops_per_device"] / peak
    if not missing:
        found["plain_ms"] = {part: _spread([one[part] for one in rounds["plain"]]) for part in SHARED}
        shares = [_shared(theirs) / _shared(ours) for theirs, ours in zip(rounds["plain"], rounds["ours"], strict=True)]
        found["plain_over_ours"] = _spread(shares)
    journal.say(_text(found, config.rounds))
    return found


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "timm": timm.__version__, "cuda": torch.version.cuda or "none"}


def _forget_peak(ranks: Ranks) -> None:
    """What ran before does not count, nor what the allocator kept of it."""
    if ranks.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gb(ranks: Ranks) -> float:
    """The most that tensors held on this device since then; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if ranks.device.type == "cuda" else 0.0


def _no_plain(config: "Config", wanted: pretrain.Config, ranks: Ranks) -> str:
    """Why the plain step cannot run beside it; empty where it can."""
    reasons = {
        "train.plain is false": not config.train.plain,
        f"{PLAIN.name} is not here: it is no part of an installed package": not PLAIN.exists(),
        "the plain step is for one process": ranks.world > 1,
        "the plain step has no stochastic depth (add model.drop_path=0 to train.overrides)": wanted.model.drop_path > 0,
        "the plain step has no micro-batches": wanted.optim.micro_batches > 1,
        "the plain step has no Gram term": not isinstance(wanted.method, DinoConfig) and wanted.method.gram is not None,
        "the plain step clips by module": wanted.optim.clip_scope != "module",
        "the plain step has fp32 and bf16 alone": wanted.precision not in ("fp32", "bf16"),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def _ours(wanted: pretrain.Config, steps: int, batches: Callable[[int], Stream], quiet: Journal, ranks: Ranks) -> Times:
    """The trainer itself, from its first weights: the second row of metrics, which is over `steps` steps after the first."""
    folder = quiet.out / "round"
    ranks.first(lambda: shutil.rmtree(folder, ignore_errors=True))
    shared = {field.name: getattr(wanted, field.name) for field in fields(TrainConfig)}
    shared["schedule"] = replace(wanted.schedule, steps=steps + 1, warmup_steps=0)
    shared["monitor"] = replace(wanted.monitor, every=steps + 1)
    opened: list[Stream] = []

    def source(start: int) -> Iterator[Batch]:
        opened.append(batches(start))
        return opened[-1]

    try:
        journal = Journal(folder, quiet.config, quiet.main)
        row = run_trainer(TrainConfig(**shared), source, [], journal, ranks, {}).row
    finally:
        for stream in opened:
            stream.close()
        ranks.first(lambda: shutil.rmtree(folder, ignore_errors=True))
    return {part: row[f"time/{part}_ms"] for part in PARTS}


def _plain(plain: ModuleType, wanted: pretrain.Config, steps: int, batches: Callable[[int], Stream], ranks: Ranks) -> Times:
    """The plain step from the same weights on the same views and masks, which are made before its clock runs."""
    student, _ = build(wanted.model, wanted.method, wanted.seed)
    backbone = timm.create_model(wanted.model.architecture, **timm_arguments(wanted.model))
    weights = {name: x.to(ranks.device, copy=True) for name, x in student.state_dict().items()}
    trainer = plain.PlainTrainer(backbone, weights, wanted.method, wanted.optim, wanted.precision, wanted.views.global_count)
    stream = batches(0)
    feed = islice(stream, steps + 1)

    def prepared(step: int) -> tuple[Any, Any]:
        batch = next(feed)
        slots = batch.slots.to(ranks.device)
        views = make_views(batch.pixels.to(ranks.device), wanted.seed, step, slots, wanted.views)
        count, px = wanted.views.global_count, wanted.views.global_px
        masks = masks_at(wanted.model, wanted.method, wanted.seed, step, batch.slots, px, count)
        crops = None if masks is None else masks.crops.to(ranks.device)
        at = scheduled(step, wanted.method, wanted.schedule)
        lr, decay = lr_at(step, wanted.optim, wanted.schedule), weight_decay_at(step, wanted.optim, wanted.schedule)
        values = plain.Values(lr, decay, at.teacher_temp, at.momentum, at.last_layer)
        return plain.Inputs(views.globals, views.locals, crops), values

    try:
        plain.timed(trainer, prepared, range(1))
        return plain.timed(trainer, prepared, range(1, steps + 1))
    finally:
        stream.close()


def _load(path: Path) -> ModuleType:
    """A module that is no part of the package, by its file."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shared(times: Times) -> float:
    return sum(times[part] for part in SHARED)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": min(values), "high": max(values)}


def _text(found: dict[str, Any], rounds: int) -> str:
    lines = [
        f"a step of {found['batch']} patches on {found['device']} ({found['recipe']}, {found['precision']}, {found['threads']} "
        f"threads), ms by part: median of {rounds} rounds (lowest to highest)"
    ]
    for part, ms in found["ms"].items():
        line = f"  {part:10} {ms['median']:9.1f}   ({ms['low']:.1f} to {ms['high']:.1f})"
        if part in found.get("plain_ms", {}):
            line = f"{line:<45} plain {found['plain_ms'][part]['median']:9.1f}"
        lines.append(line)
    mfu = "" if found["mfu"] is None else f", {found['mfu']:.1%} of the peak"
    lines.append(
        f"  {found['step_ms']['median']:.1f} ms in all, {found['patches_per_s']:.1f} patches/s, "
        f"{found['gflops_a_patch']:.2f} GFLOP a patch, {found['tflops_per_device']:.3f} TFLOP/s{mfu}"
    )
    if "peak_gb" in found:
        lines.append("  memory at its peak: " + ", ".join(f"{name} {gb:.2f} GB" for name, gb in found["peak_gb"].items()))
    if "plain_over_ours" in found:
        ratio = found["plain_over_ours"]
        lines.append(
            f"  from teacher to EMA the plainest implementation takes {ratio['median']:.2f} times as long "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    else:
        lines.append(f"  no plain step beside it: {found['no_plain']}")
    return "\n".join(lines)
