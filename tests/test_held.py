"""Whom an output folder binds, what a refused try leaves, and where a command goes that was given no folder."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from histoscale.data import fingerprint
from histoscale.data.picturefolder import list_pictures
from histoscale.data.tiles import Folder
from histoscale.launch.run import execute

QUIET = "logging.progress=off"
SMALL = [
    "recipe=demo", "sampler.patch_px=32", "sampler.grid=2", "views.global_px=32", "views.local_px=16", "views.local_count=2",
    "model.img_size=32", "model.width=48", "model.depth=1", "method.head.prototypes=32", "method.head.hidden=64",
    "method.group=4", "optim.global_batch=8", "precision=fp32", "schedule.warmup_steps=0",
    "method.teacher_temp_warmup_steps=0", "checkpoint.every=1", "monitor.every=1", "stream.workers=0", "stream.threads=1",
    "hardware.device=cpu", "hardware.threads=1", "tiles={data}/tiles",
]  # fmt: skip
PROBE = ["encoder=colour", "dataset=folder", "data_root={data}/tiles", "honest.probes=[knn]", "floors.trees=3",
         "scoring.interval.draws=20"]  # fmt: skip
# command -> the call that is right, and those that are refused: by a key, by an input, or half-way
CALLS: dict[str, tuple[list[str], list[list[str]]]] = {
    "index": (["manifest={data}/slides.csv"], [["manifest={data}/none.csv"], ["manifest={data}/broken.csv", "tissue.mpp=16"]]),
    "probe": (PROBE, [["encoder=nothing", *PROBE[1:]], [*PROBE, "hardware.batch=0"], [*PROBE, "protocols=[nope]"]]),
    "pretrain": ([*SMALL, "schedule.steps=1"], [[*SMALL, "schedule.steps=1", "monitor.labelled={data}/none"],
                 [*SMALL, "optim.global_batch=6"], [*SMALL, "schedule.steps=1", "checkpoint.keep=-1", "sampler.patch_px=64"]]),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Path]) -> Path:
    """Tiles of two classes and 12 patients, as `dataset=folder` and `tiles=` take them; a slide, and one that is none."""
    folder, rng, rows = tmp_path_factory.mktemp("data"), np.random.default_rng(0), []
    make_slide(folder / "a.svs", mpp=0.5)
    (folder / "b.svs").write_text("no slide")
    for name, slide in (("slides", "a"), ("broken", "b")):
        (folder / f"{name}.csv").write_text(f"slide_id,uri\n{slide},{slide}.svs\n")
    for i in range(48):
        name = f"p{i // 4}/{i}.png"
        (folder / "tiles" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(120 + 60 * (i % 2), 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "tiles" / name)
        split = "train" if i < 24 else "test"
        rows.append({"path": name, "label": "dark light".split()[i % 2], "split": split, "patient_id": f"p{i // 4}"})
    with (folder / "tiles/labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder


def call(command: str, keys: list[str], data: Path, out: Path) -> int:
    return execute(command, [*(key.format(data=data) if "{data}" in key else key for key in keys), QUIET, f"out={out}"])


def left(out: Path) -> tuple[dict[str, Any], ...]:
    """The names of all files, and the contents of those that hold no times."""
    state, config = json.loads((out / "state.json").read_text()), (out / "config.yaml").read_text()
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    del state["summary"]  # it holds seconds
    return names, state, config.replace(str(out), "")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the right call leaves by itself."""
    root = tmp_path_factory.mktemp("alone")
    assert [call(command, right, data, root / command) for command, (right, _) in CALLS.items()] == [0] * len(CALLS)
    return {command: left(root / command) for command in CALLS}


def test_an_input_is_no_output_and_a_run_inside_it_is_no_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("probe", PROBE, data, data / "tiles") == 2
    assert "is what data_root= names, which is read: give another folder, such as out=" in capsys.readouterr().err
    assert not (data / "tiles/state.json").exists()
    found = Folder(data / "tiles", "^(.+)/").files
    run = data / "tiles" / "run"
    run.mkdir()
    (run / fingerprint.LIST).touch()
    Image.new("RGB", (40, 40)).save(run / "patches.png")
    assert Folder(data / "tiles", "^(.+)/").files == found and list_pictures(data / "tiles").pictures == found


@pytest.mark.parametrize("wrong", CALLS["index"][1])
def test_a_look_that_fails_leaves_what_was_finished(wrong: list[str], data: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert call("index", CALLS["index"][0], data, out) == 0
    assert call("index", wrong, data, out) == 2
    assert left(out) == alone["index"]


def test_slides_that_no_table_lists_are_not_said_to_be_there(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"
    assert call("index", CALLS["index"][0], data, out) == 0
    (tmp_path / "m.csv").write_text("slide_id,uri\n" + "".join(f"{i},{data / 'b.svs'}\n" for i in range(7)))
    assert execute("index", [f"manifest={tmp_path / 'm.csv'}", f"out={out}", "logging.progress=lines"]) == 2
    said = capsys.readouterr().err
    assert "and 2 more\n" in said and "rejected.parquet" not in said


@pytest.mark.parametrize("command", CALLS)
def test_refused_calls_leave_nothing_behind(command: str, data: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    right, wrong = CALLS[command]
    out = tmp_path / command
    for keys in [*wrong, wrong[0]]:
        assert call(command, keys, data, out) == 2
    assert call(command, right, data, out) == 0
    assert call(command, wrong[-1], data, out) == 2
    assert left(out) == alone[command]
