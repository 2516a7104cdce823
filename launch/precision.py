"""`precision=auto`: what this machine computes fastest in without harm, decided once for a run and then kept."""

import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

from histoscale.launch.config import Composed, flatten

AUTO = "auto"
_PLACE = re.compile(r"precision|phases\.[^.]+\.precision")
PATIENCE_S = 7 * 86400.0  # of the group that later shares the embedding, as its commands have it
GAIN = 1.1  # bf16 must be so many times as fast on the CPU
ROUNDS = 3  # the fastest of each counts: other processes only slow down
SHAPE = {"images": 2, "tokens": 197, "width": 384, "heads": 6}  # of a ViT-S/16 at 224 px


def settled(composed: Composed, state: Mapping[str, Any] | None) -> tuple[Composed, str | None]:
    """The configuration with `precision` as a word that computes, in its phases too, and why in a line; None where nothing was
    left open.

    state: the state.json of a run that goes on: what it says stays, on any machine. Under torchrun rank 0 decides for all.
    """
    config = composed.config
    places = _open_places(composed.values)
    if not places or not hasattr(config, "hardware"):
        return composed, None
    recorded = flatten((state or {}).get("result", {}))
    known = next((recorded[place] for place in places if recorded.get(place) not in (None, AUTO)), None)

    def decide() -> tuple[str, str]:
        if known is not None:
            return known, "as this run began"
        if getattr(config, "encoder", None) == "colour":
            return "fp32", "for statistics of colour"
        trains = hasattr(config, "optim")
        if _on_cuda(config.hardware.device):
            return on_cuda(not trains or config.hardware.shard_over in ("none", 1))
        from histoscale.eval.hardware import torch_threads

        with torch_threads(config.hardware.threads):
            return on_cpu(trains)

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        word, why = decide()
    else:  # every rank asks, whatever it found in state.json: rank 0 may have written it already
        from histoscale.data.ranks import open_ranks

        word, why = open_ranks(config.hardware.device, getattr(config.hardware, "timeout_s", PATIENCE_S)).first(decide)
    values = _without_auto(composed.values, word)
    changed = {name: values[name] for name in ("precision", "phases") if name in values}
    return replace(composed, values=values, config=replace(config, **changed)), f"{places[0]}=auto: {word}, {why}"


def _open_places(values: Mapping[str, Any]) -> list[str]:
    """The dotted keys that say auto: of a command, and of the phases of a run."""
    return [key for key, value in flatten(dict(values)).items() if value == AUTO and _PLACE.fullmatch(key)]


def _on_cuda(device: str) -> bool:
    import torch

    return device != "cpu" and torch.cuda.is_available()


def on_cuda(fp16: bool) -> tuple[str, str]:
    """fp16: whether the command can compute in it (a sharded run has no scale for its loss)."""
    import torch

    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"which {name} computes"
    return ("fp16" if fp16 else "fp32"), f"as {name} has no bf16"


@cache
def on_cpu(trains: bool) -> tuple[str, str]:
    """The faster one by a block of a vision transformer: its forward, and its backward where the command trains. Measured once in
    a process."""
    import torch
    from timm.models.vision_transformer import Block
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Block(SHAPE["width"], SHAPE["heads"]).train(trains)
        x = torch.randn(SHAPE["images"], SHAPE["tokens"], SHAPE["width"])

    def lap(half: bool) -> float:
        start = time.perf_counter()
        with ExitStack() as how:
            how.enter_context(torch.set_grad_enabled(trains))
            if half:
                how.enter_context(torch.autocast("cpu", torch.bfloat16))
            if half and trains:  # as pretrain/blocks.py chooses there
                how.enter_context(sdpa_kernel(SDPBackend.MATH))
            y = block(x)
        if trains:
            y.float().square().mean().backward()
        return time.perf_counter() - start

    for half in (True, False):
        lap(half)  # kernels are chosen at the first call
    laps = [(lap(True), lap(False)) for _ in range(ROUNDS)]  # in turn, so that a busy moment meets both
    bf16, fp32 = (1000 * min(each) for each in zip(*laps, strict=True))
    word = "bf16" if bf16 * GAIN < fp32 else "fp32"
    return word, f"as a block takes {bf16:.0f} ms in bf16 and {fp32:.0f} ms in fp32 on this CPU"


def _without_auto(values: Mapping[str, Any], word: str) -> dict[str, Any]:
    """The values with this word wherever they say auto."""
    phases = {
        name: {**change, "precision": word} if isinstance(change, Mapping) and change.get("precision") == AUTO else change
        for name, change in values.get("phases", {}).items()
    }
    own = word if values["precision"] == AUTO else values["precision"]
    return {**values, "precision": own, **({"phases": phases} if phases else {})}
