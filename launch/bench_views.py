"""Views and stain normalisation: milliseconds a patch, beside torchvision v2 with the same parameters."""

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from histoscale.data.journal import Journal
from histoscale.data.normalise import slide as normalise
from histoscale.data.normalise.density import Stains
from histoscale.data.normalise.reinhard import Colours, ReinhardConfig
from histoscale.data.views import ViewsConfig, make_views

if TYPE_CHECKING:
    from torchvision.transforms import v2

    from histoscale.launch.bench import Config

# a slide's own, as typical as any: what is timed does not depend on them
_STAINS = Stains(np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]), np.array([1.8, 1.1]))
_COLOURS = Colours([60.0, 25.0, -10.0], [12.0, 6.0, 6.0])


def views(config: "Config", journal: Journal) -> dict[str, Any]:
    """Measure, print, and return ms a patch and ratios: medians over rounds whose order is shuffled.

    On a CPU it is this process's CPU time with one thread, on a GPU wall time until the work is done; there torchvision also runs
    on the CPU, as a loader's worker would. The pixels are noise: no method looks at them before it decides what to do.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count, side = config.sampler.grid**2, config.sampler.patch_px
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(config.seed)).to(torch.uint8)
    methods = _methods(pixels.to(device), config)
    times: dict[str, list[float]] = {name: [] for name in methods}
    order, shuffle = list(methods), random.Random(config.seed)
    with journal.progress(config.rounds, "rounds", "rounds") as progress:
        for turn in range(-1, config.rounds):
            shuffle.shuffle(order)
            for name in order:
                start = _clock(device)
                methods[name](max(turn, 0))
                if turn >= 0:  # the first only warms up
                    times[name].append((_clock(device) - start) / count * 1000)
            if turn >= 0:
                progress.advance(1)
    torch.set_num_threads(threads)
    found = {name: {"median": float(np.median(t)), "low": min(t), "high": max(t)} for name, t in times.items()}
    ratios = {name: float(np.median(np.divide(times[name], times["views"]))) for name in times if name.startswith("torchvision")}
    crops = f"{config.views.global_count} x {config.views.global_px} and {config.views.local_count} x {config.views.local_px} px"
    lines = [f"ms a patch of {side} px on {device.type}, median of {config.rounds} rounds (lowest to highest); views: {crops}"]
    lines += [f"  {name:18} {t['median']:9.3f}   ({t['low']:.3f} to {t['high']:.3f})" for name, t in found.items()]
    lines += [f"  {name} takes {ratio:.1f} times as long as views" for name, ratio in ratios.items()]
    result = {"device": device.type, "ms": found, **{f"{name}_over_views": ratio for name, ratio in ratios.items()}}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        methods["views"](0)
        result["views_peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        lines.append(f"  views of {count} patches at a time take {result['views_peak_gb']:.2f} GB at their peak")
    journal.say("\n".join(lines))
    return result


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _methods(pixels: Tensor, config: "Config") -> dict[str, Callable[[int], object]]:
    """By name, what is timed: a function of the round."""
    slots = torch.arange(len(pixels), device=pixels.device)
    transforms = _torchvision(config.views)
    last = pixels.permute(0, 2, 3, 1).contiguous()
    host = pixels.cpu()
    found: dict[str, Callable[[int], object]] = {
        "views": lambda turn: make_views(pixels, config.seed, turn, slots, config.views),
        "torchvision": lambda turn: [[transform(patch) for transform in transforms] for patch in pixels],
    }
    if pixels.is_cuda:
        found["torchvision on CPU"] = lambda turn: [[transform(patch) for transform in transforms] for patch in host]

    def normalised(method: normalise.Methods) -> Callable[[int], object]:
        fitted = _COLOURS if isinstance(method, ReinhardConfig) else _STAINS
        return lambda turn: normalise.apply(last, fitted, method)

    for method in (config.macenko, config.vahadane, config.reinhard):
        found[method.kind] = normalised(method)
    return found


def _torchvision(views: ViewsConfig) -> "list[v2.Compose]":
    """A transform a view, with the parameters of `views`; it has no HED jitter, and rotates by choice of four."""
    from torchvision.transforms import InterpolationMode, v2  # 80 MB, which what=catalog would count in each process

    flips = [v2.RandomHorizontalFlip(views.hflip), v2.RandomVerticalFlip(views.vflip)]
    turns = [v2.RandomChoice([v2.RandomRotation((a, a)) for a in (0, 90, 180, 270)])] if views.quarter_turns else []
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    blur = v2.GaussianBlur(views.blur.kernel_px, tuple(views.blur.sigma_px))
    kinds = [
        (views.global_px, views.global_scale, p, s) for p, s in zip(views.blur.global_p, views.global_solarize_p, strict=True)
    ]
    kinds += [(views.local_px, views.local_scale, views.blur.local_p, 0.0)] * views.local_count
    return [
        v2.Compose([
            v2.RandomResizedCrop(px, tuple(scale), tuple(views.ratio), InterpolationMode.BICUBIC, antialias=True),
            *flips, *turns,
            v2.RandomApply([jitter], views.jitter_p), v2.RandomGrayscale(views.grey_p), v2.RandomApply([blur], blur_p),
            v2.RandomSolarize(128, solarize_p), v2.ToDtype(torch.float32, scale=True), v2.Normalize(views.mean, views.std),
        ])
        for px, scale, blur_p, solarize_p in kinds
    ]  # fmt: skip
