"""A tiny training run as a program, for tests that need real processes: `python tests/train_tiny.py OUT key=value …`.

Patches come from a counter hash: a colour field of 16 numbers a patch, the same for every number of ranks.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from histoscale.data import keys as draw
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.ranks import Ranks, close_ranks, open_ranks
from histoscale.data.stream import Batch
from histoscale.data.views import BlurConfig, ViewsConfig
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.checkpoint import CheckpointConfig
from histoscale.pretrain.guard import LossScaleConfig
from histoscale.pretrain.heads import HeadConfig
from histoscale.pretrain.masking import MaskConfig
from histoscale.pretrain.methods import Dinov2Config, GramConfig
from histoscale.pretrain.monitor import MonitorConfig
from histoscale.pretrain.optim import OptimConfig
from histoscale.pretrain.parallel import HardwareConfig
from histoscale.pretrain.phase import ONLY, Phase
from histoscale.pretrain.preempted import Preempted
from histoscale.pretrain.schedule import ScheduleConfig
from histoscale.pretrain.start import StartConfig
from histoscale.pretrain.trainer import TrainConfig, TrainResult, train

HEAD = HeadConfig(prototypes=32, hidden=64, bottleneck=32, scale="frozen", batch_norm=False)
GRAM = GramConfig(
    weight=2.0, warmup_steps=0, first_step=0, source="teacher", refresh_every=2, refreshes=1, px=None, tokens="all",
    scope="image", negatives="keep",
)  # fmt: skip
CONFIG = TrainConfig(
    seed=0,
    views=ViewsConfig(
        global_count=2, global_px=32, global_scale=[0.4, 1.0], local_count=2, local_px=16, local_scale=[0.1, 0.4],
        scale_of="patch", ratio=[0.75, 1.33], hflip=0.5, vflip=0.5, quarter_turns=True, hed_p=0.5, hed_sigma_od=0.05,
        jitter_p=0.5, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02, grey_p=0.0,
        blur=BlurConfig(global_p=[0.0, 0.1], local_p=0.0, kernel_px=3, sigma_px=[0.1, 1.0]), global_solarize_p=[0.0, 0.0],
        mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5],
    ),
    model=ModelConfig(
        architecture="vit_tiny_patch16_224", img_size=32, patch_size=8, width=48, depth=2, heads=3, mlp_ratio=None, registers=0,
        layer_scale=None, drop_path=0.2,
    ),
    method=Dinov2Config(
        kind="dinov2", group=4, head=HEAD, patch_head=None, mask=MaskConfig(probability=0.5, ratio=[0.1, 0.5], shift=False),
        dino_weight=1.0, local_weight=1.0, ibot_weight=1.0, koleo_weight=0.1, koleo_pool=4, koleo_neighbours=1, kde_weight=0.0,
        kde_kappa=5.0, kde_pool=4, kde_reversed=False, gram=None,
        targets="sinkhorn", sinkhorn_iterations=3, centre_momentum=0.9, student_temp=0.1,
        teacher_temp=[0.04, 0.07], teacher_temp_warmup_steps=5, momentum=[0.9, 1.0], freeze_last_layer_steps=0,
    ),
    start=StartConfig(
        weights=None, branch="both", heads=True, moments=True, resize="timm", may_lack=[], may_ignore=[], freeze_backbone_steps=0,
    ),
    precision="fp32",
    optim=OptimConfig(
        global_batch=24, micro_batches=1, loss_scale=LossScaleConfig(first=65536.0, growth_steps=2000),
        lr=2e-3, lr_rule="none", lr_start=2e-3, lr_final=1e-4,
        betas=[0.9, 0.999], eps=1e-8, weight_decay=[0.04, 0.1],
        groups="d2", layer_decay=0.9, patch_lr=1.0, clip_scope="module", clip_value=3.0,
    ),
    schedule=ScheduleConfig(preset="d2_v1", steps=20, warmup_steps=2, horizon=None, restart=True),
    hardware=HardwareConfig(
        device="cpu", threads=1, deterministic=True, timeout_s=120.0, attention="sdpa", compile=False,
        activation_checkpointing=False, shard_over="none", reshard_after_forward=True,
    ),
    checkpoint=CheckpointConfig(every=5, keep_last=3, keep_every=None, asynchronous=True),
    monitor=MonitorConfig(
        labelled=None, labelled_every=1, every=1, window=256, ce_above=0.98, entropy_below=0.02, entropy_above=0.98,
        used_below=0.02, rankme_below=0.02, stop_on_collapse=False, peak_tflops=1.0,
    ),
)  # fmt: skip


def with_keys(config: Any, **values: Any) -> Any:
    """The configuration with dotted keys replaced: with_keys(CONFIG, **{"optim.lr": 1e-3})."""
    for name, value in values.items():
        first, _, rest = name.partition(".")
        config = replace(config, **{first: with_keys(getattr(config, first), **{rest: value}) if rest else value})
    return config


def synthetic(data_seed: int, config: TrainConfig, ranks: Ranks) -> Callable[[int], Iterator[Batch]]:
    """A source of this rank's batches, for ever."""
    share = config.optim.global_batch // ranks.world
    slots = torch.arange(share) + ranks.rank * share

    def batches(start: int) -> Iterator[Batch]:
        for step in count(start):
            field = draw.uniform(draw.keys(data_seed, "tile", step, slots), 48).view(share, 3, 4, 4)
            pixels = (F.interpolate(field, size=32, mode="bicubic").clamp(0, 1) * 255).byte()
            zeros = torch.zeros(share, dtype=torch.long)
            yield Batch(step, slots, pixels, slots % 7, torch.full((share,), 0.5), zeros, slots * 32, zeros + step, zeros)

    return batches


def journal_in(out: Path, ranks: Ranks) -> Journal:
    config = JournalConfig(progress="off", interval_s=10.0, wandb="off", wandb_project="test", tensorboard=False)
    return Journal(out, config, ranks.main)


def kill_at(step: int, source: Callable[[int], Iterator[Batch]], number: int) -> Callable[[int], Iterator[Batch]]:
    """The source, which sends this very process a signal when the batch of `step` is asked for."""

    def batches(start: int) -> Iterator[Batch]:
        for batch in source(start):
            if batch.step == step:
                os.kill(os.getpid(), number)
            yield batch

    return batches


def main(out: Path, overrides: list[str]) -> TrainResult:
    """key=value on TrainConfig's dotted keys; besides them data_seed=, kill_at=STEP, stop_at=STEP (SIGTERM), stop_rank=, and
    second=STEP for a second phase that begins there, with a Gram teacher."""
    values = {name: _value(text) for name, text in (item.split("=", 1) for item in overrides)}
    data_seed, stop_rank = values.pop("data_seed", 0), values.pop("stop_rank", 0)
    killed, stopped = values.pop("kill_at", -1), values.pop("stop_at", -1)
    second = values.pop("second", 0)
    config = with_keys(CONFIG, **values)
    if second:
        config = with_keys(config, **{"method.gram": GRAM})
    torch.set_num_threads(1)
    ranks = open_ranks("cpu", config.hardware.timeout_s)
    source = synthetic(data_seed, config, ranks)
    if ranks.rank == stop_rank:
        source = kill_at(stopped, kill_at(killed, source, signal.SIGKILL), signal.SIGTERM)
    result = train(
        config,
        source,
        [],
        journal_in(out, ranks),
        ranks,
        {"data_seed": data_seed},
        Phase(1, "second", second, second) if second else ONLY,
    )
    close_ranks()
    return result


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"null": None, "true": True, "false": False}.get(text, text)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except Preempted as stop:
        print(f"preempted {stop.step}")
        sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 75)
