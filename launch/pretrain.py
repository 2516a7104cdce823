"""Pretrain a vision transformer on the slides of a catalog, without labels; run it again to continue.

Examples:
    histoscale pretrain catalog=runs/catalog recipe=demo out=runs/small
    torchrun --nproc-per-node 8 -m histoscale.launch.pretrain catalog=az://container/catalog recipe=dinov2_vits14 out=/shared/run
    histoscale pretrain catalog=runs/catalog recipe=dinov2_vits14 schedule.steps=2 optim.global_batch=8 out=runs/trial
    histoscale pretrain catalog=runs/catalog recipe=kaiko_vits16_dino start.weights=weights/dino.safetensors out=runs/kaiko
    histoscale pretrain catalog=runs/catalog recipe=midnight_vitg14 'phase=[high_resolution]' out=runs/phases
    histoscale pretrain catalog=runs/catalog recipe=demo 'longer=[200]' out=runs/small   # 200 steps more, once it has ended
    histoscale pretrain tiles=tiles recipe=demo out=runs/tiles           # ready tiles in place of slides, or tiles.parquet
    histoscale pretrain "tiles='az://container/train-{000..041}.tar'" recipe=demo out=runs/shards    # WebDataset

A recipe sets every group; keys after it change single values; warm-ups and freezes keep their share of schedule.steps unless they
are given. A run that has ended goes on, also on a catalog that has grown, with longer=[STEPS] behind the same command, then
longer=[STEPS,STEPS] and so on, or, before the first longer=, with phases.NAME. keys, which say by themselves what continues and
what changes. `out` holds patches.png and views.png (of the first batch), parameters-*.tsv, checkpoints/step-N, metrics.jsonl
(losses, collapse read-outs, rates), lost.jsonl (visits that failed), summary.json. On SIGTERM or SIGUSR1 the run saves itself and
exits with 75.
"""

import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from histoscale.data.catalog import Catalog, open_catalog
from histoscale.data.journal import Journal, JournalConfig, plain
from histoscale.data.memory import Budget, MemoryTooSmall, StreamConfig, budget, fitted
from histoscale.data.normalise.slide import NoneConfig, NormaliseConfig, slide_normaliser
from histoscale.data.plan import PLAN_VERSION, Plan, SamplerConfig, SlideTable, rank_slots, target_name, without
from histoscale.data.ranks import Ranks, close_ranks, open_ranks, survivors
from histoscale.data.storage import StorageConfig, Store, join
from histoscale.data.stream import Batch, Stream, forget_lost
from histoscale.data.tiles import TileSource, open_tiles
from histoscale.data.views import ViewsConfig
from histoscale.data.visit import SlideSource
from histoscale.eval.architecture import trained_architecture
from histoscale.eval.datasets.cohort import CutConfig
from histoscale.eval.datasets.opening import open_dataset
from histoscale.eval.datasets.patches import DatasetConfig
from histoscale.eval.inputs import read_start
from histoscale.eval.online import Online, OnlineConfig
from histoscale.eval.view_sheet import patch_sheet, view_sheet
from histoscale.launch import held
from histoscale.launch.overrides import ConfigError
from histoscale.launch.phases import only_adds, phases_of
from histoscale.launch.trackers import tracked
from histoscale.pretrain import trainer
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.checkpoint import CheckpointConfig
from histoscale.pretrain.methods import DinoConfig, MethodConfig
from histoscale.pretrain.monitor import MonitorConfig
from histoscale.pretrain.optim import OptimConfig
from histoscale.pretrain.parallel import HardwareConfig
from histoscale.pretrain.phase import Phase, phase_reached
from histoscale.pretrain.preempted import Preempted
from histoscale.pretrain.schedule import ScheduleConfig
from histoscale.pretrain.start import StartConfig

RESULT = (
    "seed", "roles", "sampler", "normalise", "views", "model", "method", "precision", "optim", "schedule", "start", "phases",
    "longer",
)  # fmt: skip
CONTINUES = (  # said where other keys are refused
    "; a run that has ended goes on, also on a catalog that has grown, with longer=[STEPS] behind the command that made it, or, "
    "before the first longer=, with other keys in a new phase (phases.NAME...)"
)
INPUTS = ("catalog", "tiles")
MADE = ("patches*.png", "views*.png", "parameters-*.tsv", "lost.jsonl", "checkpoints", "online", "tensorboard", "wandb")
HOLDS = ("checkpoints/step-*/state.json",)
SHEET_PATCHES, SHEET_COLUMNS = 64, 16  # of patches.png
VIEWED_PATCHES = 8  # of views.png
HELD_OUT = ("test", "external")  # roles of patients that results are reported on


@dataclass(frozen=True)
class Config:
    """One of: catalog, from `histoscale index`; tiles, a folder of images, Parquet or WebDataset shards (see data/tiles.py).

    tiles_pattern: finds a slide id in the path of an image. seed: of every random choice. roles: values of the manifest's column
    `role` to train on. precision: fp32, bf16, fp16 (autocast; weights, moments and losses stay float32) or auto. phases: name ->
    what a phase behind the first changes of the one before it (launch/phases.py). longer: steps of further phases, each more of
    the same.
    """

    catalog: str | None
    tiles: str | None
    tiles_pattern: str
    seed: int
    roles: list[str]
    sampler: SamplerConfig
    normalise: NormaliseConfig
    views: ViewsConfig
    model: ModelConfig
    method: MethodConfig
    precision: str
    optim: OptimConfig
    schedule: ScheduleConfig
    start: StartConfig
    phases: dict[str, Any]
    longer: list[int]
    storage: StorageConfig
    stream: StreamConfig
    hardware: HardwareConfig
    checkpoint: CheckpointConfig
    monitor: MonitorConfig
    online: OnlineConfig
    out: str
    logging: JournalConfig


@dataclass(frozen=True)
class Opened:
    """A source with the slides of it that are trained on. transductive: whether held-out roles are among them, None: unknown."""

    source: SlideSource | TileSource
    table: SlideTable
    transductive: bool | None
    ineligible: dict[str, str]


def identity(config: Config) -> dict[str, Any]:
    """Data and weights of each phase by their hash, wherever they lie, and the version of the plan. Raises ConfigError,
    ValueError, OSError."""
    phases = ready(config)
    data = [data_hash(one) for _, one in phases]
    named = [given_weights(one) for _, one in phases]
    hashes = {spec: read_start(spec) for given in named for spec in given.values()}
    read = [{**facts, **{name: hashes[spec] for name, spec in given.items()}} for facts, given in zip(data, named, strict=True)]
    return {**read[0], "phases": [{"name": phase.name, **facts} for (phase, _), facts in zip(phases[1:], read[1:], strict=True)]}


def given_weights(config: Config) -> dict[str, str]:
    """What a phase takes from elsewhere, as `start.weights` spells it."""
    gram = None if isinstance(config.method, DinoConfig) else config.method.gram
    source = gram.source if gram is not None and gram.source != "teacher" else None
    return {name: spec for name, spec in (("weights", config.start.weights), ("gram", source)) if spec is not None}


def ready(config: Config) -> list[tuple[Phase, Config]]:
    """The phases, each found to be one that can run, as far as no data and no model are needed to know. Raises ConfigError."""
    phases = phases_of(config)
    for phase, one in phases:
        try:
            trainer.check_train(train_config(one), _world())
        except ValueError as error:
            raise ConfigError(f"phase {phase.name}: {error}" if phase.index else str(error)) from error
    return phases


def train_config(config: Config) -> trainer.TrainConfig:
    """What the trainer reads."""
    return trainer.TrainConfig(**{field.name: getattr(config, field.name) for field in fields(trainer.TrainConfig)})


def fitting(phase: Phase, config: Config, given: Budget, journal: Journal) -> StreamConfig:
    """How this rank reads in a phase: as fast as asked, or as memory allows; says which. Raises ConfigError where the plan itself
    is too large."""
    place, batch = _place(phase), config.optim.global_batch
    slots = rank_slots(batch, int(os.environ.get("RANK", "0")), _world())
    unit = config.optim.micro_batches * config.method.group
    try:
        stream, line = fitted(config.seed, config.sampler, slots, config.stream, given, place, unit)
    except MemoryTooSmall as error:
        raise ConfigError(f"phase {phase.name}: {error}" if phase.index else str(error)) from None
    journal.say(f"phase {phase.name}: {line}")
    return replace(stream, memory_gb=(given.bytes + 1) / 1e9)  # the stream finds the same


def _world() -> int:
    """Processes of this run, before they know each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _place(phase: Phase) -> str:
    """What stands before the keys of a phase on the command line."""
    return f"phases.{phase.name}." if phase.index else ""


def continues(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """A run with more phases behind its last goes on in the same `out`."""
    return only_adds(old, new)


def data_hash(config: Config) -> dict[str, Any]:
    """The catalog's or the tiles' hash, and the plan's version. Raises ValueError unless one source is given."""
    if (config.catalog is None) == (config.tiles is None):
        raise ValueError("pretrain takes either catalog= or tiles=")
    if config.tiles is not None and not isinstance(config.normalise, NoneConfig):
        raise ValueError(f"normalise={config.normalise.kind} is fitted on slides, and tiles= has none: give normalise=none")
    store = Store(config.storage)
    if config.catalog is not None:
        return {"catalog": open_catalog(config.catalog, store).hash, "plan": PLAN_VERSION}
    listed = open_tiles(str(config.tiles), config.tiles_pattern, config.sampler, store).tiles
    return {"tiles": held.digest([listed.identity, listed.columns]), "plan": PLAN_VERSION}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Train every phase to the end of its schedule. Raises what data/stream.py and pretrain/trainer.py raise, and ValueError."""
    phases = ready(config)
    given = budget(config.stream)
    readings = {phase.index: fitting(phase, one, given, journal) for phase, one in phases}
    hashes = identity(config)
    ranks = open_ranks(config.hardware.device, config.hardware.timeout_s)
    check_shared(journal.out, ranks)
    reached = phase_reached(journal.out / "checkpoints", [(phase, one.schedule.steps) for phase, one in phases], ranks)
    opened = [open_phase(phase, one, journal) for phase, one in phases[reached:]]  # all of them, before the first is trained
    rows = tracked(journal, {**{key: plain(asdict(config)[key]) for key in RESULT}, **hashes})
    for (phase, one), (data, plan) in zip(phases[reached:], opened, strict=True):
        reading = replace(one, stream=readings[phase.index])
        told = _train_phase(phase, reading, data, plan, rows, ranks, phase is phases[-1][0])
    close_ranks()
    patches = sum(one.schedule.steps * one.optim.global_batch for _, one in phases)
    listed = [{"name": phase.name, "first": phase.first, "steps": one.schedule.steps} for phase, one in phases]
    return {"pretrain": {**told, "precision": config.precision, "patches": patches, "phases": listed}}


def what_next(config: Config, summary: dict[str, Any]) -> str:
    """What to open and what to type when a run has ended."""
    out, checkpoint = Path(config.out), summary["pretrain"]["checkpoint"]
    given, release, probe = (shlex.quote(str(out) + behind) for behind in ("", "_release", "_probe"))
    steps = [*config.longer, (config.longer or [config.schedule.steps])[-1]]
    more = shlex.quote(f"longer={steps}".replace(" ", ""))
    return (
        f"checkpoint: {out / checkpoint}\n"
        f"to look at: {out / 'patches.png'} and {out / 'views.png'}: the first batch, and its views\n"
        f"next:       histoscale release checkpoint={given} out={release}\n"
        f"            histoscale probe encoder={given} dataset=folder data_root=FOLDER_OF_LABELLED_TILES out={probe}\n"
        f"to go on:   the same command and {more}"
    )


def _train_phase(
    phase: Phase, config: Config, opened: Opened, plan: Plan, journal: Journal, ranks: Ranks, last: bool
) -> dict[str, Any]:
    """One phase on its own source; what the summary says of it."""
    source, table = opened.source, opened.table
    facts = {
        **(data_hash(config) if isinstance(source, TileSource) else {"catalog": source.catalog.hash, "plan": PLAN_VERSION}),
        "sampler": asdict(without(config.sampler, plan.dropped) or config.sampler),
        "dropped": [target_name(target) for target in plan.dropped],
        "normalise": asdict(config.normalise),
        "data": describe(source, table),
        "transductive": opened.transductive,
    }
    streams: list[Stream] = []

    def batches(start: int) -> Iterator[Batch]:
        lost = journal.path("lost.jsonl")
        ranks.first(lambda: forget_lost(lost, start))
        streams.append(Stream(plan, source, config.stream, ranks.rank, ranks.world, start, lost))
        return pictured(streams[-1], config, phase, journal) if start == phase.first else streams[-1]

    def reading(backbone: nn.Module, step: int) -> dict[str, float]:
        streams[-1].check_lost(ranks.sum)
        counted = streams[-1].stats()
        del counted["data/wait_fraction"]  # the trainer's own leaves out what watchers take
        return counted

    probe = online_probe(config, phase, journal, ranks)
    watchers: list[trainer.Watcher] = [probe, reading] if probe else [reading]
    try:
        with survivors(lambda: f"at step {streams[-1].step}" if streams else ""):
            result = trainer.train(train_config(config), batches, watchers, journal, ranks, facts, phase)
        if result.stopping and not last:  # asked to stop in the very last step
            raise Preempted(result.step)
    except Preempted:
        close_ranks()
        raise
    finally:
        for stream in streams:
            stream.close()
    tally = streams[-1].tally.summed(ranks.sum)
    journal.say(f"what was streamed:\n{tally.text()}")
    for warning in tally.warnings():
        journal.say(warning)
    return {
        "steps": result.step,
        "checkpoint": str(result.checkpoint.relative_to(journal.out)),
        "last": result.row,
        "streamed": tally.mix(),
        "ineligible": opened.ineligible,
        "data": facts["data"],
        "transductive": opened.transductive,
        **({"online": probe.summary()} if probe else {}),
    }


def online_probe(config: Config, phase: Phase, journal: Journal, ranks: Ranks) -> Online | None:
    """The watcher of monitor.labelled; None, and a line that says so, without. Raises ValueError, DatasetError."""
    labelled, every = config.monitor.labelled, config.monitor.labelled_every
    if labelled is None:
        journal.say("no kNN or linear probe while it trains: monitor.labelled= names no labelled set")
        return None
    if every % config.monitor.every:
        raise ValueError(f"monitor.labelled_every={every} is not a multiple of monitor.every={config.monitor.every}")
    catalog = config.online.catalog or config.catalog or join(labelled, "catalog")
    cut = CutConfig(config.online.grid.mpp_tolerance, config.online.grid.max_upsample, config.stream.threads)
    patches = open_dataset(config.online.dataset, labelled, catalog, cut, Store(config.storage))
    dataset = config.online.dataset
    if config.catalog is not None and isinstance(dataset, DatasetConfig) and dataset.report in config.roles:
        journal.say(f"the online probes report on patients of the role {dataset.report}, which are trained on")
    views, sampler = config.views, config.sampler
    architecture = trained_architecture(config.model, views.mean, views.std, sampler.mpps, sampler.patch_px, None)
    end, precision = phase.first + config.schedule.steps, config.precision
    return Online(patches, architecture, precision, config.online, every, end, journal, ranks)


def open_phase(phase: Phase, config: Config, journal: Journal) -> tuple[Opened, Plan]:
    """The source of a phase and its plan; says which magnifications are dropped. Raises ConfigError for a plan that does not
    come out, and what open_source raises."""
    opened = open_source(config, journal)
    try:
        plan = Plan(config.seed, config.optim.global_batch, config.sampler, opened.table, f"{_place(phase)}sampler")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if plan.dropped:
        left = ", ".join(target_name(plan.targets[target]) for target in plan.served)
        named = ", ".join(target_name(target) for target in plan.dropped)
        journal.say(f"phase {phase.name}: no slide serves {named} um/px: dropped (sampler.unservable=drop); left: {left}")
    return opened, plan


def open_source(config: Config, journal: Journal) -> Opened:
    """The slides or tiles, what each can serve, and which of them are trained on; says what is left out and why."""
    store = Store(config.storage)
    if config.catalog is None:
        tiles = open_tiles(str(config.tiles), config.tiles_pattern, config.sampler, store)
        for note in tiles.notes:
            journal.say(f"tiles: {note}")
        return Opened(tiles, tiles.table(), None, {})
    catalog = open_catalog(config.catalog, store)
    slides = SlideSource(catalog, store, config.sampler, slide_normaliser(catalog, store, config.normalise))
    table = slides.table()
    for slide_id, why in slides.ineligible:
        journal.say(f"ineligible: {slide_id}: {why}")
    kept = of_roles(catalog, config.roles, journal)
    table = replace(table, eligible=table.eligible & kept[:, None])
    labels = catalog.labels("role")
    roles = {labels[row] for row in np.flatnonzero(table.eligible.any(axis=1))}
    transductive = None if roles <= {None} else bool(roles & set(HELD_OUT))
    if transductive:
        journal.say(f"transductive: slides of the roles {', '.join(HELD_OUT)} are trained on; label every number of this run so")
    return Opened(slides, table, transductive, dict(slides.ineligible))


def of_roles(catalog: Catalog, roles: list[str], journal: Journal) -> np.ndarray:
    """bool [slides]: those whose label `role` is in `roles`; all, and a line that says so, without such a column."""
    found = catalog.labels("role")
    if not any(found):
        journal.say("the manifest has no column `role`: every slide is trained on")
        return np.ones(len(found), bool)
    kept = np.array([role in roles for role in found])
    counted = ", ".join(f"{role or 'none'} ({n})" for role, n in sorted(Counter(map(str, found)).items()))
    if not kept.any():
        raise ValueError(f"roles={roles} selects no slide; the manifest has {counted}")
    journal.say(f"{int(kept.sum())} of {len(found)} slides have a role in {roles}; there are: {counted}")
    return kept


def describe(source: SlideSource | TileSource, table: SlideTable) -> dict[str, Any]:
    """Counts and names for the log and the model card."""
    used = [int(row) for row in np.flatnonzero(table.eligible.any(axis=1))]
    sites, scanners, organs = zip(*(source.describe(row) for row in used), strict=True) if used else ((), (), ())
    return {
        "slides": len(used),
        "patients": len({table.patients[row] for row in used}),
        "sites": sorted(set(sites) - {""}),
        "organs": sorted(set(organs) - {""}),
        "scanners": sorted(set(scanners) - {""}),
    }


def pictured(batches: Iterator[Batch], config: Config, phase: Phase, journal: Journal) -> Iterator[Batch]:
    """The same batches; the first one's patches and views are also pictures, because people should look before they train."""
    first = next(batches)
    if journal.main:
        name = f"-{phase.name}" if phase.index else ""
        sheet = patch_sheet(first.pixels[:SHEET_PATCHES].numpy(), SHEET_COLUMNS)
        Image.fromarray(sheet).save(journal.path(f"patches{name}.png"))
        seen = view_sheet(first.pixels[:VIEWED_PATCHES], config.seed, first.slots[:VIEWED_PATCHES], config.views)
        Image.fromarray(seen).save(journal.path(f"views{name}.png"))
    yield first
    yield from batches


def check_shared(out: Path, ranks: Ranks) -> None:
    """Raises ValueError on all ranks unless each of them sees what rank 0 writes into `out`."""
    probe = out / ".seen-by-all-ranks"
    out.mkdir(parents=True, exist_ok=True)
    ranks.first(probe.touch)
    blind = [rank for rank, sees in enumerate(ranks.objects(probe.exists())) if not sees]
    ranks.first(lambda: probe.unlink(missing_ok=True))
    if blind:
        raise ValueError(f"out={out} is not one folder for all processes: rank {blind[0]} does not see what rank 0 writes there")


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("pretrain", sys.argv[1:]))
