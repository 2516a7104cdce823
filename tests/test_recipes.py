"""Every recipe composes, starts from weights of its own architecture and takes two steps at reduced width; its values hold."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from histoscale.data.memory import Budget, fitted
from histoscale.launch.config import load
from histoscale.launch.phases import phases_of
from histoscale.launch.run import invoke
from histoscale.pretrain.backbone import build_backbone
from histoscale.pretrain.checkpoint import read_checkpoint
from histoscale.pretrain.optim import peak_lr

RECIPES = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "configs/recipe").glob("*.yaml"))
NAMED = {
    "kaiko_vits16_dino", "kaiko_vits8_dino", "kaiko_vitb16_dino", "kaiko_vitb8_dino", "kaiko_vitl14_dinov2", "midnight_vitg14",
    "midnight_vitg14_392", "openmidnight_vitg14", "dinov2_vitl16_short", "one_gpu_hour",
}  # fmt: skip
HEAD = ["prototypes=64", "hidden=64", "bottleneck=32"]


@cache
def composed(recipe: str, *more: str) -> Any:
    return load("pretrain", [f"recipe={recipe}", "catalog=c", "out=o", *more]).config


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of four tiles in the colours of tissue, 512 px a side."""
    folder = tmp_path_factory.mktemp("tiles")
    noise = np.random.default_rng(0)
    for slide in "ab":
        (folder / slide).mkdir()
        for i in range(4):
            coarse = noise.integers(-40, 40, (64, 64, 3)).repeat(8, 0).repeat(8, 1)
            pixels = np.clip(np.array([190, 120, 180]) + coarse, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / slide / f"{i}.png")
    return folder


def reduced(recipe: str, tmp_path: Path) -> list[str]:
    """The recipe at a width of 32, with as many phases, views, heads and micro-batches as it has."""
    config = composed(recipe)
    model, method = config.model, config.method
    micro = config.optim.micro_batches
    pools = [] if method.kind == "dino" else ["method.koleo_pool=2", "method.kde_pool=2"]
    patch_head = getattr(method, "patch_head", None) is not None
    small = replace(model, width=32, depth=2, heads=2)
    keys = [
        f"recipe={recipe}", "model.width=32", "model.depth=2", "model.heads=2", "method.group=2", *pools,
        *[f"method.head.{key}" for key in HEAD], *[f"method.patch_head.{key}" for key in HEAD if patch_head],
        f"optim.global_batch={2 * micro}", "schedule.steps=2", "schedule.warmup_steps=1", "method.freeze_last_layer_steps=1",
        "sampler.grid=1", "sampler.lanes_per_slot=1", "stream.workers=0", "stream.threads=1", "hardware.device=cpu",
        "hardware.threads=1", "precision=bf16", "logging.progress=off", "monitor.every=1",
    ]  # fmt: skip
    for name, phase in config.phases.items():
        batch = 2 * phase.get("optim", {}).get("micro_batches", micro)
        keys += [f"phases.{name}.{key}" for key in ("schedule.steps=2", "schedule.warmup_steps=0", "method.group=2",
                 f"optim.global_batch={batch}", "method.koleo_pool=2", "method.kde_pool=2")]  # fmt: skip
    if config.start.weights is None:
        return keys
    side = 518 if "dinov2" in config.start.weights else 224
    save_file(build_backbone(replace(small, img_size=side), 5).state_dict(), tmp_path / "model.safetensors")
    frozen = min(config.start.freeze_backbone_steps, 1)
    return [*keys, f"start.weights={tmp_path / 'model.safetensors'}", f"start.freeze_backbone_steps={frozen}"]


def test_all_published_systems_are_there() -> None:
    assert set(RECIPES) >= NAMED


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_two_steps_in_each_phase(recipe: str, tmp_path: Path, tiles: Path) -> None:
    summary = invoke("pretrain", [*reduced(recipe, tmp_path), f"tiles={tiles}", f"out={tmp_path / 'run'}"])["pretrain"]
    config = composed(recipe)
    assert summary["steps"] == 2 * (1 + len(config.phases)) and np.isfinite(summary["last"]["loss"])
    assert summary["last"]["grad_norm/backbone"] > 0
    began = read_checkpoint(tmp_path / "run/checkpoints/step-2").facts["phase"]["began"]
    assert began[0].startswith("starts from fresh weights" if config.start.weights is None else f"starts from {tmp_path}")
    resized = config.start.weights is not None and "dinov2" in config.start.weights
    assert any("positions resized from 37x37 to 16x16" in line for line in began) == resized


@pytest.mark.parametrize("recipe", sorted({*RECIPES} - {"demo"}))
def test_weights_and_model_of_a_recipe_are_one_architecture(recipe: str) -> None:
    config = composed(recipe)
    weights = config.start.weights
    assert weights is None or weights.removeprefix("timm:").rpartition(".")[0] == config.model.architecture
    assert weights is None or not weights.endswith(".dino") or config.model.layer_scale is None  # DINO has none
    assert (config.model.registers > 0) == ("reg4" in config.model.architecture)


@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_fit_together(recipe: str) -> None:
    for _, config in phases_of(composed(recipe)):
        assert config.optim.global_batch % (config.method.group * config.optim.micro_batches) == 0
        assert config.views.global_px % config.model.patch_size == 0 == config.views.local_px % config.model.patch_size
        assert config.views.global_px == config.model.img_size or recipe == "demo"
        assert config.schedule.warmup_steps < config.schedule.steps


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_process_of_a_machine_of_64_gb_reads_every_recipe(recipe: str) -> None:
    for _, config in phases_of(composed(recipe)):
        given = Budget(int(64e9 * config.stream.memory_share), "a machine of 64 GB")
        as_it_is, _ = fitted(config.seed, config.sampler, range(config.optim.global_batch), config.stream, given)
        assert as_it_is == config.stream  # no speed is taken from it either


# Steps of the schedule, of its warm-up and the temperature's, and those that last layers and the backbone are frozen for.
COUNTED = {
    "demo": (200, 16, 0, 0, 0),
    "dinov2_vitl16_short": (125000, 12500, 37500, 1250, 0),
    "dinov2_vits14": (125000, 12500, 37500, 1250, 0),
    "kaiko_vitb16_dino": (500400, 50040, 0, 5004, 0),
    "kaiko_vitb8_dino": (500400, 50040, 0, 5004, 0),
    "kaiko_vitl14_dinov2": (125000, 12500, 37500, 1250, 1250),
    "kaiko_vits16_dino": (500400, 50040, 0, 5004, 0),
    "kaiko_vits8_dino": (500400, 50040, 0, 5004, 0),
    "midnight_vitg14": (500100, 16670, 50010, 1667, 1667),
    "midnight_vitg14_392": (500100, 16670, 50010, 1667, 1667),
    "one_gpu_hour": (7800, 234, 2100, 78, 78),
    "openmidnight_vitg14": (137500, 12500, 37500, 1250, 0),
}


def counted(config: Any) -> tuple[int, ...]:
    method = config.method
    frozen = method.freeze_last_layer_steps, config.start.freeze_backbone_steps
    return config.schedule.steps, config.schedule.warmup_steps, method.teacher_temp_warmup_steps, *frozen


@pytest.mark.parametrize("recipe", RECIPES)
def test_warm_ups_and_freezes_keep_their_share_of_another_length(recipe: str) -> None:
    own, steps = COUNTED[recipe], 2000
    assert counted(composed(recipe)) == own
    found = counted(composed(recipe, f"schedule.steps={steps}"))
    assert found == (steps, *(round(count * steps / own[0]) for count in own[1:]))


def test_what_is_given_stays_and_a_horizon_is_the_length() -> None:
    found = composed("one_gpu_hour", "schedule.steps=20", "schedule.horizon=7800", "method.freeze_last_layer_steps=3")
    assert counted(found) == (20, 234, 2100, 3, 78)


def test_phases_keep_shares_of_their_own_length() -> None:
    more = ["phase=[high_resolution,gram]", "schedule.steps=20", "phases.high_resolution.schedule.steps=300"]
    _, (_, high), (_, gram) = phases_of(composed("midnight_vitg14", *more, "phases.gram.schedule.steps=80"))
    assert high.schedule.warmup_steps == 10 and gram.method.gram.refresh_every == 20
    assert phases_of(composed("demo", "phase=[gram]", "phases.gram.schedule.steps=1"))[1][1].method.gram.refresh_every == 1


# What the papers and their code say (base rate, batch, effective rate, steps, last weight decay, first momentum, drop path).
PUBLISHED = {
    "dinov2_vitl16_short": (4e-3, 2048, 5.66e-3, 125000, 0.4, 0.992, 0.3),
    "midnight_vitg14": (3.5e-4, 768, 3.03e-4, 500100, 0.2, 0.994, 0.4),
    "openmidnight_vitg14": (3e-4, 384, 1.84e-4, 137500, 0.2, 0.994, 0.4),
    "kaiko_vits16_dino": (5e-4, 256, 5e-4, 500400, 0.4, 0.996, 0.1),
    "kaiko_vitl14_dinov2": (2e-4, 1024, 2e-4, 125000, 0.2, 0.994, 0.4),
}


@pytest.mark.parametrize("recipe", sorted(PUBLISHED))
def test_effective_learning_rates_are_the_published_ones(recipe: str) -> None:
    config = composed(recipe)
    optim, (base, batch, effective, steps, decay, momentum, drop_path) = config.optim, PUBLISHED[recipe]
    assert (optim.lr, optim.global_batch, config.schedule.steps) == (base, batch, steps)
    assert peak_lr(optim) == pytest.approx(effective, rel=0.005)
    assert (optim.weight_decay[1], config.method.momentum[0], config.model.drop_path) == (decay, momentum, drop_path)


def test_the_high_resolution_phase_halves_mpp_and_has_its_own_rate() -> None:
    (_, base), (_, high) = phases_of(composed("midnight_vitg14_392"))
    assert [2 * mpp for mpp in high.sampler.mpps] == base.sampler.mpps and high.sampler.patch_px == 2 * base.sampler.patch_px
    assert (high.views.global_px, high.views.local_px, high.model.img_size) == (392, 168, 392)
    assert peak_lr(high.optim) == pytest.approx(1.06e-4, rel=0.005) and high.optim.global_batch == 1152
    assert high.method.teacher_temp[0] == base.method.teacher_temp[1] and high.optim.weight_decay[0] == base.optim.weight_decay[1]
    assert high.start.weights is None and high.start.freeze_backbone_steps == 0


@pytest.mark.slow
def test_the_run_at_392_px_begins_as_the_run_at_224(tmp_path: Path, tiles: Path) -> None:
    """In the folder of a finished midnight_vitg14 only the new phase is trained."""
    keys = reduced("midnight_vitg14", tmp_path)
    invoke("pretrain", [*keys, f"tiles={tiles}", f"out={tmp_path / 'run'}"])
    longer = reduced("midnight_vitg14_392", tmp_path)
    summary = invoke("pretrain", [*longer, f"tiles={tiles}", f"out={tmp_path / 'run'}"])["pretrain"]
    assert summary["steps"] == 4 and [phase["name"] for phase in summary["phases"]] == ["base", "high_resolution"]


def test_one_gpu_hour_is_at_most_a_million_patches() -> None:
    config = composed("one_gpu_hour")
    assert config.schedule.steps * config.optim.global_batch <= 1_000_000
