"""Where the time of a step goes: patches a second, waiting for data, milliseconds by part, and the share of the peak in use.

On a GPU the parts are measured by events in its queue, which are read where the host waits for the device anyway.
"""

import time
from collections.abc import Iterator

import torch

from histoscale.data.stream import Batch

PARTS = ("data", "views", "teacher", "student", "losses", "backward", "optimiser", "ema", "other")


class Meter:
    """Counts since the last reading. The parts of a step are marked by `lap` in the order in which they run.

    flops: of one patch (pretrain/flops.py); peak: FLOP/s of one device. None: no MFU.
    """

    def __init__(self, device: torch.device, flops: float | None = None, peak: float | None = None) -> None:
        self.device, self.flops, self.peak = device, flops, peak
        self.restart()

    def restart(self) -> None:
        """What was since the last reading does not count."""
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.laps: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        self.lap("other")  # rows, checkpoints
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        self.steps += 1
        self.lap("data")
        return batch

    def lap(self, part: str) -> None:
        """What ran since the last mark was `part`, one of PARTS. Does not wait for the device."""
        self.laps.append((part, self._now()))

    def read(self, patches: int, world: int) -> dict[str, float]:
        """For a row: `patches` a step over `world` ranks. Waits for the device; counting starts anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        passed = time.perf_counter() - self.start
        rate = patches * self.steps / passed
        found = {"images_per_s": rate, "data/wait_fraction": self.waited / passed}
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.laps, self.laps[1:], strict=False):
            spent[part] += _between_ms(before, after)
        found |= {f"time/{part}_ms": value / self.steps for part, value in spent.items()}
        if self.flops is not None and self.peak is not None:
            found |= {"tflops_per_device": self.flops * rate / world / 1e12, "mfu": self.flops * rate / world / self.peak}
        self.restart()
        return found

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_ms(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return (after - before) * 1000
    assert isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event)
    return before.elapsed_time(after)
