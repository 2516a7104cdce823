"""What an earlier run left, empty, cut or of another kind: one sentence that names the file and what to do, at every reader."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from histoscale.data import fingerprint
from histoscale.data.journal import keep_rows
from histoscale.data.storage import Store
from histoscale.eval.architecture import read_architecture
from histoscale.eval.evidence.verdicts import VerdictError, read_verdicts
from histoscale.eval.hub import EncoderError
from histoscale.eval.mil.ensemble import load_ensemble
from histoscale.eval.mil.folder import read_folder
from histoscale.eval.predictions import PredictionsError, load_predictions
from histoscale.eval.runs import RunsError
from histoscale.eval.stores import StoreError
from histoscale.launch import release
from histoscale.launch.compare_settings import read_settings
from histoscale.launch.demo_report import _metrics
from histoscale.launch.held import Refused, read_state
from histoscale.launch.release import _measured, _recorded
from histoscale.launch.run import execute
from histoscale.pretrain.checkpoint import CheckpointError, read_checkpoint
from histoscale.pretrain.start import StartError, _indexed

DAMAGE = {
    "empty": b"", "blank": b" \n", "zeros": bytes(64), "cut": b'{"command": "index", "ident', "list": b"[1, 2]", "null": b"null",
    "number": b"5", "deep": b"[" * 200_000, "no text": b"\xff\xfe\x00{", "open": b'{"a":' * 100_000,
}  # fmt: skip


def measured(path: Path) -> object:
    return _measured(release.Config("none", str(path), "fp32", None, "none", None))  # type: ignore[arg-type]


def mil_run(path: Path) -> object:
    from histoscale.eval.mil.compare import _open

    (path.parent / "scores.csv").write_text("slide_id,part\n")
    return _open("a", path.parent)


READERS: dict[str, tuple[str, Callable[[Path], object], type[Exception], str]] = {
    "state of a folder": ("state.json", lambda path: read_state(path.parent), Refused, "give another out="),
    "settings of a run": ("state.json", lambda path: read_settings({"a": path.parent}), Refused, "give another out="),
    "checkpoint": ("state.json", lambda path: read_checkpoint(path.parent), CheckpointError, "cannot be read"),
    "scores for a card": ("summary.json", measured, ValueError, "cannot be read"),
    "an earlier release": ("summary.json", _recorded, ValueError, "delete it"),
    "a study": ("summary.json", mil_run, RunsError, "run it again"),
    "rows of the demo": ("metrics.jsonl", _metrics, ValueError, "delete the line"),
    "model": ("config.json", lambda path: load_ensemble(path.parent), ValueError, "does not hold"),
    "verdict": ("a.json", lambda path: read_verdicts(path.parent), VerdictError, "expected histoscale-verdict-1"),
    "shards": ("model.safetensors.index.json", _indexed, StartError, "is no index"),
    "predictions": ("predictions.npz", load_predictions, PredictionsError, "run the probe again"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_record_is_named_with_what_to_do(tmp_path: Path, reader: str, damage: str) -> None:
    name, read, error, advice = READERS[reader]
    path = tmp_path / name
    path.write_bytes(DAMAGE[damage])
    if reader == "rows of the demo" and damage == "empty":
        assert read(path) == []  # no row is no damage: the rows that were wanted are missed elsewhere
        return
    with pytest.raises(error, match=advice) as caught:
        read(path)
    text = str(caught.value)
    assert str(tmp_path) in text and "\n" not in text and len(text) < 600


@pytest.mark.parametrize("state", [
    {"command": "index", "identity": "1", "status": "done", "result": [], "facts": {}},
    {"command": "index", "identity": 1, "status": "done", "result": {}, "facts": {}},
    {"command": "index", "status": "done"},
    {"command": ["index"], "identity": "1", "status": "done", "result": {}, "facts": {}},
])  # fmt: skip
def test_a_state_of_other_kinds_binds_nobody_in_silence(tmp_path: Path, state: dict[str, object]) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(Refused, match="state.json is damaged .no usable "):
        read_state(tmp_path)


@pytest.mark.parametrize("data", [b"", bytes(20), b'{"command": "embed", "sta'])
def test_stores_behind_a_damaged_state_are_not_taken_for_finished(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "state.json").write_bytes(data)
    with pytest.raises(StoreError, match="state.json is damaged .*its embed may not have finished: run that embed again"):
        read_folder(tmp_path)
    (tmp_path / "state.json").write_text('{"command": "embed", "status": "done"}')
    (tmp_path / "summary.json").write_bytes(data)
    with pytest.raises(StoreError, match="summary.json is damaged"):
        read_folder(tmp_path)
    (tmp_path / "summary.json").write_text('{"embed": {"failed": [1]}}')
    assert read_folder(tmp_path).failed == {}


@pytest.mark.parametrize("line", [b"5", b"[1]", b"null", b'"x"', b"[" * 100_000, b"\xff", b"{"])
def test_rows_that_are_none_go_and_the_others_stay(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    keep_rows(path, lambda row: row.get("step") != 2)
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("line", ["5", "[1, 2, 3]", '["a", 5, "b"]', '[["a"], [1], "b"]', '["a", ["b"]]', "[" * 100_000, '"abc"'])
def test_a_list_of_inputs_that_is_none_is_as_none(tmp_path: Path, line: str) -> None:
    (tmp_path / "inputs.jsonl").write_text(f'["m", "00"]\n{line}\n')
    assert fingerprint.load(tmp_path / "inputs.jsonl") == {}


LOOKS = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
CONFIG = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32}, "pretrained_cfg": LOOKS}


@pytest.mark.parametrize(("config", "card", "words"), [
    ({"model_args": {"checkpoint_path": "evil.pth"}}, {}, "model_args set checkpoint_path"),
    ({"model_args": {"pretrained": True}}, {}, "model_args set pretrained"),
    ({"architecture": "hf-hub:owner/evil"}, {}, "architecture is 'hf-hub:owner/evil'"),
    ({"architecture": 5}, {}, "odd value"),
    ({"model_args": [1]}, {}, "odd value"),
    ({"pretrained_cfg": {**LOOKS, "mean": [0.5]}}, {}, "odd value"),
    ({"pretrained_cfg": {**LOOKS, "input_size": 5}}, {}, "odd value"),
    ({"pretrained_cfg": None}, {}, "odd value"),
    ({}, {"mpp": [1]}, "odd value"),
    ({}, {"mpp": {"trained_at": ["x"]}}, "odd value"),
    ({}, {"tile_px": "wide"}, "odd value"),
])  # fmt: skip
def test_a_release_describes_a_network_and_nothing_else(
    tmp_path: Path, store: Store, config: dict[str, object], card: dict[str, object], words: str
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (tmp_path / "MODEL.json").write_text(json.dumps(card))
    with pytest.raises(EncoderError, match=words) as error:
        read_architecture(str(tmp_path), store)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "MODEL.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_release_is_named(tmp_path: Path, store: Store, name: str, damage: str) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(DAMAGE[damage])
    with pytest.raises(EncoderError, match=f"{name} is not JSON of a release .*release it again"):
        read_architecture(str(tmp_path), store)


def test_commands_say_it_in_one_line(tmp_path: Path, make_slide: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """state.json and config.yaml of a folder that holds a result, each empty, cut and of another kind."""
    make_slide(tmp_path / "a.svs", mpp=0.5)
    (tmp_path / "m.csv").write_text("slide_id,uri\na,a.svs\n")
    out, typed = tmp_path / "catalog", [f"manifest={tmp_path}/m.csv", f"out={tmp_path}/catalog", "logging.progress=off"]
    assert execute("index", typed) == 0
    for name, advice in (("state.json", "give another out="), ("config.yaml", "delete it")):
        whole = (out / name).read_bytes()
        for data in (b"", b"[1]", b"{a: [", b"!!python/object/apply:os.system ['true']"):
            (out / name).write_bytes(data)
            capsys.readouterr()
            assert execute("index", typed) == 2
            said = capsys.readouterr().err.strip()
            assert len(said.splitlines()) == 1 and f"{out / name} is damaged" in said and advice in said
        (out / name).write_bytes(whole)
    assert execute("index", typed) == 0


def test_predictions_that_lie_are_named(tmp_path: Path) -> None:
    path, about = (
        tmp_path / "predictions.npz",
        {"format": "histoscale-predictions-1", "outcomes": [], "scores": [], "groups": "none"},
    )
    about |= {"dataset": "d", "data_hash": "0", "classes": ["a"], "positive": None, "encoders": {}}
    arrays = {"labels": np.zeros(2, np.int64), "patients": np.array(["p", "q"]), "roles": np.array(["r", "r"])}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(path, about=text, **arrays)
    assert load_predictions(path).classes == ("a",)
    for name, value in {"labels": np.zeros(()), "roles": np.zeros((2, 2)), "patients": np.zeros(2), "about": np.zeros(3)}.items():
        np.savez_compressed(path, **{"about": text, **arrays, name: value})
        with pytest.raises(PredictionsError, match="predictions.npz (does not fit itself|is not a whole file)"):
            load_predictions(path)
    np.savez_compressed(path, about=text, **arrays)
    whole, held = path.read_bytes(), repr(load_predictions(path))
    for place, change in product(range(len(whole)), (1, 0xFF)):  # 1: the mark of what is encrypted among them
        harmed = bytearray(whole)
        harmed[place] ^= change
        path.write_bytes(harmed)
        try:
            assert repr(load_predictions(path)) == held, (place, change)  # dates and the like mean nothing
        except PredictionsError as error:
            assert str(path) in str(error)
