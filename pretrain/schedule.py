"""Schedules as pure functions of the optimiser step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    preset: str  # where warm-up and cosine end: "d2_v1" (DINOv2, arXiv 2304.07193) or "d3_v2" (DINOv3, arXiv 2508.10104)
    steps: int  # optimiser steps of this phase
    warmup_steps: int  # of the learning rate
    horizon: int | None  # steps after which every schedule has ended, null: steps; a longer one leaves the run on its way there
    restart: bool  # a later phase counts from its own first step; false: from where the phase before it counts

    @property
    def length(self) -> int:
        return self.horizon or self.steps


def cosine(step: int, config: ScheduleConfig, warmup: int, start: float, peak: float, final: float) -> float:
    """Linear from `start` to `peak` in `warmup` steps, then a half cosine to `final` at `config.length`; `final` from there on.

    d2_v1: the warm-up includes the peak, the cosine starts there again and its last step is not yet `final`.
    d3_v2: the warm-up stops short of the peak and the last step is `final`. Raises ValueError for another preset.
    """
    if config.preset not in ("d2_v1", "d3_v2"):
        raise ValueError(f"schedule.preset={config.preset!r}: expected d2_v1 or d3_v2")
    if warmup > config.length:
        raise ValueError(
            f"schedule.warmup_steps={warmup} does not fit into schedule.steps={config.length}: give fewer, or leave it out, and "
            "it keeps the share that it has in the recipe"
        )
    closed = config.preset == "d3_v2"
    if step >= config.length:
        return final
    if step < warmup:
        return start + (peak - start) * step / max(warmup if closed else warmup - 1, 1)
    turn = (step - warmup) / max(config.length - warmup - (1 if closed else 0), 1)
    return peak - 0.5 * (peak - final) * (1 - math.cos(math.pi * turn))


def linear_then_flat(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps` - 1 in even steps, then `end` (teacher temperature, arXiv 2104.14294)."""
    return end if step >= steps else start + (end - start) * step / max(steps - 1, 1)
