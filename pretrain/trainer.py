"""The training loop: batch, views, teacher, student, losses, one update; readable in one sitting.

No step waits for the device but those that write a row or a checkpoint.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histoscale.data import keys as draw
from histoscale.data.journal import Journal, plain, write_text
from histoscale.data.ranks import Ranks
from histoscale.data.secrets import scrubbed
from histoscale.data.stream import Batch
from histoscale.data.views import ViewsConfig, make_undistorted, make_views
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.checkpoint import CheckpointConfig
from histoscale.pretrain.flops import flops_a_patch
from histoscale.pretrain.guard import Guard, LossScale
from histoscale.pretrain.masking import Masks
from histoscale.pretrain.meter import Meter
from histoscale.pretrain.methods import (
    Centres,
    GramTeacher,
    Losses,
    MethodConfig,
    Scheduled,
    build,
    build_gram_teacher,
    check_pools,
    first_centres,
    gram_takes_teacher,
    losses,
    masks_at,
    scheduled,
)
from histoscale.pretrain.monitor import MonitorConfig, Window, signs_of_collapse
from histoscale.pretrain.optim import OptimConfig, build_optimizer, lr_at, peak_lr, set_scheduled, table_text, weight_decay_at
from histoscale.pretrain.parallel import HardwareConfig, Parallel, autocast, check_precision, prepare, set_threads
from histoscale.pretrain.phase import ONLY, Phase, begin, enter, find_state
from histoscale.pretrain.preempted import Preempted, stop_signals
from histoscale.pretrain.saving import Saver
from histoscale.pretrain.schedule import ScheduleConfig
from histoscale.pretrain.start import StartConfig, check_start

Source = Callable[[int], Iterator[Batch]]
Watcher = Callable[[nn.Module, int], dict[str, float]]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the loop reads in one phase. The result keys are all but hardware, checkpoint and monitor."""

    seed: int
    views: ViewsConfig
    model: ModelConfig
    method: MethodConfig
    precision: str
    optim: OptimConfig
    schedule: ScheduleConfig
    start: StartConfig
    hardware: HardwareConfig
    checkpoint: CheckpointConfig
    monitor: MonitorConfig

    def result(self) -> dict[str, Any]:
        """The keys that make the result, as plain values."""
        speed = ("hardware", "checkpoint", "monitor")
        return {name: value for name, value in plain(dataclasses.asdict(self)).items() if name not in speed}


@dataclass(frozen=True)
class TrainResult:
    """steps done, both branches on this rank's device, the last checkpoint, the last row of metrics, and whether a signal that
    came in the last step asks the run to go no further."""

    step: int
    student: nn.Module
    teacher: nn.Module
    checkpoint: Path
    row: dict[str, float]
    stopping: bool


class Collapsed(ValueError):
    """The read-outs say collapse, and monitor.stop_on_collapse is set."""


def train(
    config: TrainConfig,
    source: Source,
    watchers: Sequence[Watcher],
    journal: Journal,
    ranks: Ranks,
    facts: Mapping[str, Any],
    phase: Phase = ONLY,
) -> TrainResult:
    """Train one phase of schedule.steps, from the newest whole checkpoint in the journal's `checkpoints` on.

    source(step): this rank's batches from that step on. watchers: called with the teacher's backbone and the steps done, before
    the first step and at each row of metrics. facts: what else makes the result (sampler, catalog hash); it must equal the
    checkpoint's. Steps are counted from the start of the first phase.
    Raises ValueError (a batch that does not divide, a checkpoint of another run), StartError, Preempted, NonFinite, Collapsed and
    CheckpointError.
    """
    optim, method, schedule, end = config.optim, config.method, config.schedule, phase.first + config.schedule.steps
    check_train(config, ranks.world)
    set_threads(config.hardware)
    folder = journal.out / "checkpoints"
    state = find_state(folder, journal, ranks)
    student, teacher = build(config.model, method, config.seed)
    said = [] if state else begin(student, teacher, config.start, config.seed)
    parallel = prepare(student, teacher, config.hardware, config.precision, ranks)
    optimizer = build_optimizer(student.named_parameters(), len(student.backbone.blocks), optim)
    start_moments(optimizer)
    scale = LossScale(optim.loss_scale, config.precision, ranks.device)
    guard = Guard(optimizer, scale, ranks)
    centres = first_centres(method, ranks.device)
    anchor = build_gram_teacher(config.model, method)
    anchor = None if anchor is None else anchor.to(ranks.device)
    identity = scrubbed({**config.result(), "facts": plain(facts)})  # as the checkpoints keep it
    tensors = state_tensors(parallel, optimizer, centres, anchor) | scale.tensors()
    start, began = enter(state, phase, identity, config.start, tensors, student.backbone, anchor, said, journal, ranks)
    place = {**dataclasses.asdict(phase), "steps": schedule.steps, "began": began}
    if start < end:
        journal.say(_opening(config, phase, began, parallel, ranks))
        table = table_text(student.named_parameters(), len(student.backbone.blocks), optim)
        ranks.first(lambda: write_text(journal.path(f"parameters-{phase.name}.tsv"), table))
    saver = Saver(folder, config.checkpoint, ranks)
    window, recent = Window(config.monitor.window, ranks), list[Batch]()
    peak = None if config.monitor.peak_tflops is None else config.monitor.peak_tflops * 1e12
    flops = None if peak is None else flops_a_patch(config.model, method, config.views)
    meter = Meter(ranks.device, flops, peak)
    row: dict[str, float] = {"step": start}
    signs: dict[str, str] = {}
    told: set[str] = set()
    stopping = False

    def save(step: int) -> None:
        if step == phase.first and phase.index:
            return  # the last checkpoint of the phase before it is this state
        tensors = state_tensors(parallel, optimizer, centres, anchor) | scale.tensors()
        saver.save(step, tensors, {"identity": identity, "phase": place})

    def watched(done: int) -> dict[str, float]:
        found: dict[str, float] = {}
        with parallel.watched() as backbone:
            for watcher in watchers:
                found |= watcher(backbone, done)
        meter.restart()  # looking is not training
        return found

    journal.forget(lambda row: _again(row, start, phase))
    batches = source(start)
    if start == phase.first and start < end and watchers:  # before anything moves: what the weights that it starts from are worth
        journal.row(step=start, phase=phase.name, **watched(start))
    with stop_signals() as asked, saver, journal.progress(end, "pretrain", "step") as progress:
        progress.advance(start)
        for step in range(start, end):
            batch = meter.wait_for(batches)
            if step == start and ranks.any(bool(asked)):  # while the first batch was read, before anything moved
                raise Preempted(step or None)
            recent.append(dataclasses.replace(batch, pixels=batch.pixels[:0].clone()))  # places, not pixels
            at = step - phase.origin  # where schedules stand
            lr, weight_decay = lr_at(at, optim, schedule), weight_decay_at(at, optim, schedule)
            now = scheduled(at, method, schedule)
            set_scheduled(optimizer, lr, weight_decay, now.last_layer, step - phase.first >= config.start.freeze_backbone_steps)

            if anchor is not None and gram_takes_teacher(at, method):
                parallel.copy_teacher(anchor, guard.healthy)

            # Forward and backward of every micro-batch; gradients of all ranks meet in the last one.
            shown: dict[str, Tensor] = {}
            next_centres = centres
            share = len(batch.slots) // optim.micro_batches
            for piece in range(optim.micro_batches):
                rows = slice(piece * share, (piece + 1) * share)
                with parallel.accumulating(last=piece == optim.micro_batches - 1):
                    found, tokens = _losses(config, parallel, anchor, batch, rows, step, next_centres, now, meter)
                    (found.total / optim.micro_batches * scale.value).backward()
                    meter.lap("backward")
                next_centres = found.centres
                window.add(tokens, {name.split("/")[0]: x for name, x in found.read.items() if name.endswith("/prototypes")})
                for name, value in _scalars(found).items():
                    shown[name] = shown.get(name, 0) + value / optim.micro_batches

            # One update, or none: from the first loss or gradient that is not finite on, nothing moves any more.
            if scale.used:
                parallel.scale_gradients(1 / scale.value)
            norms = parallel.norms()
            guard.check(shown["loss"], norms, step)
            parallel.clip(optim.clip_scope, optim.clip_value, norms)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.lap("optimiser")
            parallel.update_teacher((1 - now.momentum) * guard.healthy)
            meter.lap("ema")
            centres = guard.choose(next_centres, centres)

            # Looking, saving and stopping: the only places where the host waits for the device.
            done = step + 1
            stopping = ranks.any(bool(asked))
            saving = done == end or stopping or done % config.checkpoint.every == 0
            if saving or done % config.monitor.every == 0 or step == start:
                guard.raise_if_tripped(recent, save, journal)
                recent.clear()
                row = {
                    "step": done,
                    **{name: float(ranks.mean(value)) for name, value in shown.items()},
                    **window.read(),
                    **{f"grad_norm/{name}": float(norm) for name, norm in norms.items()},
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "teacher_momentum": now.momentum,
                    "teacher_temp": now.teacher_temp,
                    **guard.read(),
                    **meter.read(optim.global_batch, ranks.world),
                }
                row |= watched(done)
                journal.row(**row)
                signs = signs_of_collapse(row, at + 1, schedule.warmup_steps, config.monitor)
                for sign in sorted(signs.keys() - told):  # each is told once, and stays in the rows
                    journal.say(f"step {done}: WARNING, {signs[sign]}")
                told |= signs.keys()
            rate, waiting = f"{row['images_per_s']:.0f} patches/s", f"{row['data/wait_fraction']:.0%}"
            progress.advance(loss=row["loss"], rate=rate, waiting=waiting)
            if saving:
                save(done)
            if stopping and done < end:
                raise Preempted(done)
            if signs and config.monitor.stop_on_collapse:
                raise Collapsed(f"step {done}: {'; '.join(signs.values())} (monitor.stop_on_collapse is set)")
    return TrainResult(end, student, teacher, folder / f"step-{end}", row, stopping)


def _losses(
    config: TrainConfig,
    parallel: Parallel,
    anchor: GramTeacher | None,
    batch: Batch,
    rows: slice,
    step: int,
    centres: Centres,
    now: Scheduled,
    meter: Meter,
) -> tuple[Losses, Tensor]:
    """One micro-batch, the batch's `rows`: losses with gradient, and the teacher's class tokens [B, D] of the first view."""
    method, device = config.method, parallel.ranks.device
    slots = batch.slots[rows]
    on_device = slots.to(device, non_blocking=True)
    pixels = batch.pixels[rows].to(device, non_blocking=True)
    views = make_views(pixels, config.seed, step, on_device, config.views)
    count = config.views.global_count
    masks = masks_at(config.model, method, config.seed, step, slots, views.globals.shape[-1], count)  # drawn on the CPU
    masks = None if masks is None else Masks(*(x.to(device, non_blocking=True) for x in masks))
    meter.lap("views")
    crops, indices = (None, None) if masks is None else (masks.crops, masks.indices)
    with autocast(config.precision, device):
        taught = parallel.teacher(views.globals, None, None, indices)
        meter.lap("teacher")
        drawn = draw.keys(config.seed, "stochastic depth", step, on_device)
        learned = parallel.student(views.globals, views.locals, crops, indices, drawn)
        meter.lap("student")
        dense = None
        if anchor is not None and now.gram_weight > 0:
            px, side = anchor.config.px, config.views.global_px // config.model.patch_size
            seen = views.globals if px is None else make_undistorted(pixels, config.seed, step, on_device, config.views, px)
            dense = anchor(seen, (side, side))
            meter.lap("teacher")
    found = losses(learned, taught, masks, centres, method, now, count, parallel.ranks.group, dense)
    meter.lap("losses")
    return found, taught["features"][: len(slots)]


def _again(row: Mapping[str, Any], start: int, phase: Phase) -> bool:
    """Whether a row of metrics is computed again by a run that goes on from `start`: of a later step, or of what the watchers
    say before the first step of this phase."""
    step = row.get("step")
    return step is not None and (step > start or (step == start == phase.first and row.get("phase") == phase.name))


def _scalars(found: Losses) -> dict[str, Tensor]:
    """What a row of metrics shows of one micro-batch; still on the device."""
    shares = {f"{name}_of_lnk": value for name, value in found.read.items() if not name.endswith("/prototypes")}
    return {"loss": found.total.detach(), **{f"loss/{name}": value for name, value in found.terms.items()}, **shares}


def check_train(config: TrainConfig, world: int) -> None:
    """What needs no data and no model to be found wrong: raises ValueError for a batch or pools that do not divide, a precision
    that there is not, and a schedule that does not come out."""
    optim, method, schedule, start = config.optim, config.method, config.schedule, config.start
    check_precision(config.precision)
    check_batch(optim.global_batch, world, optim.micro_batches, method.group)
    check_pools(method, optim.global_batch // optim.micro_batches)
    if min(config.checkpoint.every, config.checkpoint.keep_last, config.monitor.every, schedule.steps) < 1:
        raise ValueError("checkpoint.every, checkpoint.keep_last, monitor.every and schedule.steps must be at least 1")
    lr_at(0, optim, schedule)
    weight_decay_at(0, optim, schedule)
    scheduled(0, method, schedule)
    check_start(start)


def check_batch(global_batch: int, world: int, micro_batches: int, group: int) -> None:
    """Raises ValueError, naming the nearest batches that would do, unless processes x micro-batches x group divides the batch."""
    unit = world * micro_batches * group
    if global_batch % unit or global_batch < unit:
        low = global_batch // unit * unit
        nearest = " or ".join(f"optim.global_batch={batch}" for batch in (low, low + unit) if batch)
        share, rest = divmod(global_batch, world * micro_batches)
        smaller = [g for g in range(group - 1, 0, -1) if share and not rest and share % g == 0]
        raise ValueError(
            f"optim.global_batch={global_batch} does not divide into {world} processes x {micro_batches} micro-batches of whole "
            f"groups of method.group={group}: give {nearest}" + (f", or method.group={smaller[0]}" if smaller else "")
        )


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's moments at zero, as its first step would make them, so that a checkpoint has tensors to load into."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def state_tensors(
    parallel: Parallel, optimizer: torch.optim.Optimizer, centres: Centres, anchor: GramTeacher | None
) -> dict[str, Tensor]:
    """The whole state by name: student, teacher, moments, centres, Gram teacher. Loading fills these very tensors."""
    tensors = parallel.tensors()
    for name, p in parallel.bare_student.named_parameters():
        tensors |= {f"optimizer.{name}.{moment}": x for moment, x in optimizer.state[p].items()}
    tensors |= {} if anchor is None else {f"gram.{name}": x for name, x in anchor.state_dict().items()}
    return tensors | {f"centres.{name}": x for name, x in centres._asdict().items()}


def _opening(config: TrainConfig, phase: Phase, began: Sequence[str], parallel: Parallel, ranks: Ranks) -> str:
    optim, schedule, method = config.optim, config.schedule, config.method
    millions = sum(p.numel() for p in parallel.bare_student.parameters()) / 1e6
    together = optim.global_batch // optim.micro_batches
    counted = f"schedules count from step {phase.origin} over {schedule.length} steps"
    return (
        f"phase {phase.name}, steps {phase.first} to {phase.first + schedule.steps}: {'; '.join([*began, counted])}\n"
        f"of them the learning rate warms up over {schedule.warmup_steps} (schedule.warmup_steps), the teacher's temperature "
        f"over {method.teacher_temp_warmup_steps} (method.teacher_temp_warmup_steps); frozen at first: the last layers of heads "
        f"for {method.freeze_last_layer_steps} (method.freeze_last_layer_steps), the backbone for "
        f"{config.start.freeze_backbone_steps} (start.freeze_backbone_steps)\n"
        f"learning rate {peak_lr(optim):.3g} (base {optim.lr:g}, rule {optim.lr_rule}) for a batch of {optim.global_batch}: "
        f"{ranks.world} processes x {optim.micro_batches} micro-batches x {together // ranks.world}; "
        f"teacher targets are assigned over {together} patches at a time; student {millions:.1f}M parameters, "
        f"{config.precision} on {ranks.device.type}"
    )
