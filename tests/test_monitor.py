"""Read-outs by their definitions, the FLOPs of a patch, and a loop that asks the device for nothing between its rows."""

import json
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from histoscale.data.ranks import Ranks
from histoscale.data.stream import Batch
from histoscale.launch.config import load
from histoscale.pretrain.flops import flops_a_patch
from histoscale.pretrain.meter import PARTS, Meter
from histoscale.pretrain.monitor import Window, mean_cosine, odcorr, rankme_cov, rankme_sv
from histoscale.pretrain.trainer import train

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def entropy_rank(weights: Tensor) -> float:
    p = weights / weights.sum()
    return math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0))


@pytest.mark.parametrize("rows", [500, 20], ids=["tall", "wide"])
def test_the_two_rankmes_are_what_their_names_say(rows: int) -> None:
    z = draws(rows, 32) * torch.linspace(0.1, 3, 32, dtype=torch.float64) + 2
    p = torch.linalg.svdvals(z)
    p = p / p.sum() + 1e-7
    assert float(rankme_sv(z)) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-8)
    assert float(rankme_cov(z)) == pytest.approx(entropy_rank(torch.linalg.eigvalsh(torch.cov(z.T)).clamp_min(1e-12)), rel=1e-6)
    assert abs(float(rankme_sv(z)) - float(rankme_cov(z))) > 1  # never to be mixed up


def test_rank_of_known_spectra() -> None:
    basis = torch.linalg.qr(draws(400, 16) - draws(400, 16).mean(0))[0]
    basis = basis - basis.mean(0)
    flat = torch.linalg.qr(basis)[0]
    assert float(rankme_sv(flat)) == pytest.approx(16, rel=1e-4) and float(rankme_cov(flat)) == pytest.approx(16, rel=1e-6)
    one = flat[:, :1] @ draws(1, 16)
    assert float(rankme_sv(one)) == pytest.approx(1, abs=1e-3) and float(rankme_cov(one)) == pytest.approx(1, abs=1e-3)
    moved = one + 100  # a common offset is a second direction, which centring takes away again
    assert float(rankme_cov(moved)) == pytest.approx(1, abs=1e-3) and float(rankme_cov(moved)) < float(rankme_sv(moved))


def test_correlations_have_their_known_floors_and_ceilings() -> None:
    n, width = 20_000, 24
    absolute, squared, constant = odcorr(draws(n, width))
    assert float(absolute) == pytest.approx(math.sqrt(2 / (math.pi * n)), rel=0.1)
    assert float(squared) == pytest.approx(1 / n, rel=0.2) and int(constant) == 0
    z = draws(n, 1).expand(-1, 6) * torch.tensor([1.0, -2, 3, -4, 5, 6], dtype=torch.float64)
    absolute, squared, _ = odcorr(z)
    assert float(absolute) == pytest.approx(1) == float(squared)
    z = torch.cat([draws(n, 4), torch.full((n, 3), 7.0, dtype=torch.float64)], 1)
    assert int(odcorr(z)[2]) == 3 and float(odcorr(z)[0]) < 0.02
    pair = draws(n, 2)
    pair[:, 1] = 0.6 * pair[:, 0] + 0.8 * pair[:, 1]
    assert float(odcorr(pair)[0]) == pytest.approx(0.6, abs=0.02) and float(odcorr(pair)[1]) == pytest.approx(0.36, abs=0.02)


def test_mean_cosine_is_over_pairs_of_different_rows() -> None:
    z = draws(40, 8) + 0.5
    unit = torch.nn.functional.normalize(z, dim=1)
    cosines = unit @ unit.T
    expected = (cosines.sum() - cosines.trace()) / (40 * 39)
    assert float(mean_cosine(z)) == pytest.approx(float(expected), rel=1e-12)
    assert float(mean_cosine(z[:1].expand(5, -1))) == pytest.approx(1) and float(mean_cosine(z[:1])) == 0


def test_a_window_names_its_conventions_and_its_size() -> None:
    window = Window(64, ALONE)
    for start in range(0, 160, 16):
        window.add(draws(160, 8)[start : start + 16], {"dino": torch.ones(10, dtype=torch.int64)})
    found = window.read()
    assert found["rankme_n"] == 64
    last = draws(160, 8)[-64:].float()
    assert found["rankme_sv"] == pytest.approx(float(rankme_sv(last))) and found["rankme_cov"] == pytest.approx(
        float(rankme_cov(last))
    )
    assert found["rankme_sv_of_width"] == pytest.approx(found["rankme_sv"] / 8)
    assert {"odcorr_abs", "odcorr_sq", "mean_cosine", "dino/prototypes_used"} <= found.keys()


# FLOPs of a patch, against arithmetic on depth, width and tokens: 24 N D^2 + 4 N^2 D a block for N tokens.


@pytest.mark.parametrize(
    ("keys", "billions"),
    [
        (["model=vits16", "method=dino"], 114),
        (["model=vits16"], 124),
        (["model=vitb16"], 446),
        (["model=vitl16"], 1538),
    ],
    ids=["S/16 dino", "S/16", "B/16", "L/16"],
)
def test_flops_are_those_of_the_formula(keys: list[str], billions: float) -> None:
    given = ["recipe=demo", "views=default", "method=dinov2", *keys, "model.drop_path=0.0", "catalog=c", "out=o"]
    config = load("pretrain", given).config
    assert flops_a_patch(config.model, config.method, config.views) / 1e9 == pytest.approx(billions, rel=0.02)


def test_flops_of_a_giant_with_registers() -> None:
    config = load("pretrain", ["recipe=openmidnight_vitg14", "model.drop_path=0.0", "catalog=c", "out=o"]).config
    assert flops_a_patch(config.model, config.method, config.views) / 1e9 == pytest.approx(7849, rel=0.02)


def test_what_stochastic_depth_leaves_out_does_not_count() -> None:
    """Rate .5 halves what the student's blocks cost and leaves the rest, so MFU does not rise by switching it off."""
    config = train_tiny.CONFIG
    full, half = (
        flops_a_patch(train_tiny.with_keys(config.model, drop_path=rate), config.method, config.views) for rate in (0.0, 0.5)
    )
    width, depth = config.model.width or 0, config.model.depth or 0
    tokens = {"global": (32 // 8) ** 2 + 1, "local": (16 // 8) ** 2 + 1}
    blocks = {name: depth * (24 * n * width**2 + 4 * n**2 * width) for name, n in tokens.items()}
    saved = 0.5 * 3 * (2 * blocks["global"] + 2 * blocks["local"])
    assert full - half == pytest.approx(saved, rel=0.02)


def test_a_meter_splits_the_time_of_a_step_and_knows_the_peak() -> None:
    meter = Meter(torch.device("cpu"), flops=2e6, peak=1e9)
    batches = iter([None] * 3)
    for _ in range(3):
        meter.wait_for(batches)  # type: ignore[arg-type]
        for part in PARTS[1:]:
            meter.lap(part)
    found = meter.read(64, 2)
    times = {part: found[f"time/{part}_ms"] for part in PARTS}
    assert all(value >= 0 for value in times.values())
    total = 64 / found["images_per_s"] * 1000
    assert sum(times.values()) <= total * 1.001
    assert found["mfu"] == pytest.approx(2e6 * found["images_per_s"] / 2 / 1e9)
    assert found["tflops_per_device"] * 1e12 / 1e9 == pytest.approx(found["mfu"])
    blind = Meter(torch.device("cpu"))
    blind.wait_for(iter([None]))  # type: ignore[list-item]
    assert "mfu" not in blind.read(64, 1)


# The loop.


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a number, and shapes that depend on values.

    Not what is on the host wherever the model is: masks are drawn there, and views on the CPU pick rows (on a GPU they do not).
    """

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal", "_linalg_check_errors")
    HOST = ("make_masks", "_where")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").split(".")[0]
        if name in self.WAITS and not any(frame.name in self.HOST for frame in traceback.extract_stack()):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["dinov2", "kde", "centering"])
def test_between_rows_the_loop_asks_the_device_for_nothing(tmp_path: Path, method: str) -> None:
    """On the CPU nothing waits, so what would is counted, a step at a time: some at a row, none between."""
    torch.set_num_threads(1)
    more: dict[str, dict[str, Any]] = {
        "dinov2": {},
        "kde": {"method.koleo_weight": 0.0, "method.kde_weight": 0.1},
        "centering": {"method.targets": "centering"},
    }
    config = train_tiny.with_keys(
        train_tiny.CONFIG, **{"schedule.steps": 9, "checkpoint.every": 100, "monitor.every": 4, **more[method]}
    )
    counted: dict[int, int] = {}
    asked = Asked()

    def source(start: int) -> Iterator[Batch]:
        for batch in train_tiny.synthetic(0, config, ALONE)(start):
            counted[batch.step] = asked.count
            yield batch

    with asked:
        train(config, source, [], train_tiny.journal_in(tmp_path, ALONE), ALONE, {})
    counted[9] = asked.count
    by_step = {step: counted[step + 1] - counted[step] for step in range(9)}
    silent = [1, 2, 4, 5, 6]  # rows after the first step and after steps 4 and 8
    assert {step: by_step[step] for step in silent} == dict.fromkeys(silent, 0)
    assert by_step[0] > 0 and by_step[3] > 0 and by_step[7] > 0  # what is counted does count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose own watch over synchronisation it uses")
def test_between_rows_cuda_sees_no_synchronisation(tmp_path: Path) -> None:
    keys = {"schedule.steps": 9, "checkpoint.every": 100, "monitor.every": 9, "hardware.device": "cuda"}
    config = train_tiny.with_keys(train_tiny.CONFIG, **keys, **{"hardware.deterministic": False})
    ranks = Ranks(0, 1, 0, torch.device("cuda"), False)

    def source(start: int) -> Iterator[Batch]:
        for batch in train_tiny.synthetic(0, config, ALONE)(start):
            torch.cuda.set_sync_debug_mode("error" if 2 <= batch.step <= 7 else "default")
            yield batch

    try:
        train(config, source, [], train_tiny.journal_in(tmp_path, ranks), ranks, {})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_holds_what_people_watch(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = train_tiny.with_keys(train_tiny.CONFIG, **{"schedule.steps": 3, "checkpoint.every": 100})
    train(config, train_tiny.synthetic(0, config, ALONE), [], train_tiny.journal_in(tmp_path, ALONE), ALONE, {})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in reversed(rows) if "loss" in row)
    flops = flops_a_patch(config.model, config.method, config.views)
    assert row["mfu"] == pytest.approx(flops * row["images_per_s"] / 1e12)
    names = {"rankme_cov", "rankme_sv", "odcorr_abs", "odcorr_sq", "mean_cosine", "dino/student_entropy_of_lnk", "dino/kl_of_lnk",
             "dino/target_entropy_of_lnk", "ibot/ce_of_lnk", "ibot/prototypes_used", "grad_norm/backbone", "grad_norm/head",
             "lr", "weight_decay", "teacher_momentum", "teacher_temp", "images_per_s", "data/wait_fraction",
             *(f"time/{part}_ms" for part in PARTS)}  # fmt: skip
    assert names <= row.keys() and all(row[name] is not None for name in names)
