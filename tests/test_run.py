"""The way every command runs: composing, refusing, continuing, exit codes."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from histoscale.data.journal import Journal, JournalConfig
from histoscale.launch import cli, lease
from histoscale.launch import config as config_module
from histoscale.launch import run as run_module
from histoscale.launch.config import COMMANDS, Composed, ConfigError, load, schema_keys
from histoscale.launch.run import Refused, invoke


@dataclass(frozen=True)
class ToyConfig:
    size: int
    workers: int
    out: str
    logging: JournalConfig


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A command whose runs are counted; only its composition is replaced, the rest is the real road."""
    calls: list[int] = []
    module = ModuleType("toy")
    module.RESULT = ("size",)  # type: ignore[attr-defined]
    module.Config = ToyConfig  # type: ignore[attr-defined]

    def work(config: ToyConfig, journal: Journal) -> dict[str, Any]:
        calls.append(config.size)
        if config.size < 0:
            raise ValueError("size is negative")
        return {"toy": {"size": config.size}}

    module.MADE = ("made*.txt",)  # type: ignore[attr-defined]
    module.HOLDS = ("half-made",)  # type: ignore[attr-defined]
    module.run = work  # type: ignore[attr-defined]

    def compose(command: str, overrides: list[str]) -> Composed:
        values: dict[str, Any] = {"size": 1, "workers": 0, "out": "outputs/toy", "logging": {"progress": "off"}}
        values.update((k, type(values[k])(v)) for k, v in (o.split("=") for o in overrides))
        logging = JournalConfig(progress="off", interval_s=1, wandb="off", wandb_project="t", tensorboard=False)
        return Composed(module, ToyConfig(values["size"], values["workers"], values["out"], logging), values)

    monkeypatch.setattr(run_module, "load", compose)
    return calls


def test_same_result_is_not_made_twice(toy: list[int], tmp_path: Path) -> None:
    first = invoke("toy", ["size=3", f"out={tmp_path / 'o'}"])
    second = invoke("toy", ["size=3", f"out={tmp_path / 'o'}", "workers=2"])
    assert toy == [3] and first["toy"] == second["toy"]


def test_other_result_keys_are_refused_by_name(toy: list[int], tmp_path: Path) -> None:
    invoke("toy", ["size=3", f"out={tmp_path / 'o'}"])
    with pytest.raises(Refused, match="size: 3 there, 4 now"):
        invoke("toy", ["size=4", f"out={tmp_path / 'o'}"])


def test_a_mistake_does_not_claim_the_folder(toy: list[int], tmp_path: Path) -> None:
    out = tmp_path / "o"
    with pytest.raises(ValueError):
        invoke("toy", ["size=-1", f"out={out}"])
    assert "size is negative" in (out / "error.log").read_text()
    assert invoke("toy", ["size=2", f"out={out}"])["toy"] == {"size": 2}


def test_changed_speed_keys_are_noted(toy: list[int], tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    (out / "half-made").touch()
    for workers in (0, 5):
        with pytest.raises(ValueError):
            invoke("toy", ["size=-1", f"out={out}", f"workers={workers}"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"changed": {"workers": [0, 5]}}]


def test_a_result_without_a_given_folder_finds_its_own(
    toy: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/toy-broken").mkdir(parents=True)
    Path("outputs/toy-broken/state.json").write_text("{")  # another's trouble
    for size in (3, 4, 5, 4, 3, 5):
        assert invoke("toy", [f"size={size}"])["toy"] == {"size": size}
    assert toy == [3, 4, 5]
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["toy", "toy-broken", "toy-size-4", "toy-size-5"]
    with pytest.raises(Refused, match=r"size: 3 there, 6 now.*such as out=outputs/toy-size-6, or the old values"):
        invoke("toy", ["size=6", "out=outputs/toy"])


def test_a_default_folder_in_use_is_left_alone(toy: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("toy", ["size=3"])
    (tmp_path / "outputs/toy/state.json").write_text(
        (tmp_path / "outputs/toy/state.json").read_text().replace('"done"', '"running"').replace("true", "false")
    )
    with lease.alone(tmp_path / "outputs/toy", print):  # another one, that has not made anything yet
        assert invoke("toy", ["size=4"])["toy"] == {"size": 4}
        with pytest.raises(Refused, match="another run is writing to outputs/toy"):
            invoke("toy", ["size=3"])
    assert (tmp_path / "outputs/toy-size-4/summary.json").exists()


def test_what_was_there_before_is_no_leftover(toy: list[int], tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    (out / "made.txt").write_text("mine")
    for size in (-1, -2):
        with pytest.raises(ValueError):
            invoke("toy", [f"size={size}", f"out={out}"])
        (out / "notes.txt").write_text("mine too")
        (out / "made-more.txt").write_text("left by the command")
    assert invoke("toy", ["size=2", f"out={out}"])["toy"] == {"size": 2}
    assert {path.name for path in out.glob("*.txt")} == {"made.txt", "notes.txt"}


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "metrics.jsonl", "summary.json", "error.log"])
def test_files_of_something_else_are_neither_overwritten_nor_deleted(toy: list[int], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    for size in (-1, 2):
        with pytest.raises(Refused, match=rf"holds {name} of something that is no run.*such as out={tmp_path / 'toy'}, or move"):
            invoke("toy", [f"size={size}", f"out={tmp_path}"])
    assert (tmp_path / name).read_text() == '{"mine": 1}' and not toy


@pytest.mark.parametrize("harm", ["edited", "gone"])
def test_a_summary_that_the_run_did_not_write_is_refused(toy: list[int], tmp_path: Path, harm: str) -> None:
    out = tmp_path / "o"
    invoke("toy", ["size=3", f"out={out}"])
    text = (out / "summary.json").read_text()
    (out / "summary.json").unlink()
    if harm == "edited":
        (out / "summary.json").write_text(text.replace("3", "4"))
    with pytest.raises(Refused, match=r"summary.json is (gone|not as the run wrote it)"):
        invoke("toy", ["size=3", f"out={out}"])
    (out / "summary.json").write_text(text)
    assert invoke("toy", ["size=3", f"out={out}"])["toy"] == {"size": 3}


def test_a_damaged_state_is_named(toy: list[int], tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(Refused, match=r"state.json is damaged"):
        invoke("toy", ["size=3", f"out={tmp_path}"])


def test_two_runs_do_not_share_a_folder(toy: list[int], tmp_path: Path) -> None:
    with lease.alone(tmp_path / "o", print), pytest.raises(Refused, match="another run"):
        invoke("toy", [f"out={tmp_path / 'o'}"])


def test_the_program_alone_lists_every_command() -> None:
    lines = cli.usage().splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(COMMANDS) and all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_schema(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_module.execute(command, ["--help"]) == 0
    assert f"histoscale {command}" in capsys.readouterr().out
    module = __import__(f"histoscale.launch.{command}", fromlist=["Config"])
    keys = schema_keys(module.Config)
    assert set(module.RESULT) <= set(keys) and {"out", "logging"} <= set(keys)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_unknown_keys_name_the_nearest(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'logging.progres'; did you mean 'logging.progress'"):
        load("doctor", [f"{prefix}logging.progres=off"])


def test_wrong_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"logging.interval_s = 'soon'"):
        load("doctor", ["logging.interval_s=soon"])
    with pytest.raises(ConfigError, match="flag"):
        load("doctor", ["--verbose"])
    with pytest.raises(ConfigError, match="sweep"):
        load("doctor", ["logging.interval_s=1,2"])


def test_required_keys_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="index needs manifest="):
        load("index", [])


def test_no_default_hides_in_the_code() -> None:
    """Values live in configs/: no field of any command's schema has a default."""
    import dataclasses

    def fields(schema: type) -> None:
        for field in dataclasses.fields(schema):
            assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING, f"{schema}.{field.name}"
        for kind in config_module.get_type_hints(schema).values():
            for option in config_module.nested(kind):
                fields(option)

    for command in COMMANDS:
        fields(__import__(f"histoscale.launch.{command}", fromlist=["Config"]).Config)


def test_no_key_is_dead() -> None:
    """Every field of every schema is read somewhere as an attribute."""
    root = Path(__file__).resolve().parents[1]
    code = "\n".join(f.read_text() for folder in ("data", "eval", "launch", "pretrain") for f in (root / folder).rglob("*.py"))
    for command in COMMANDS:
        module = __import__(f"histoscale.launch.{command}", fromlist=["Config"])
        for name in schema_keys(module.Config):
            assert f".{name.split('.')[-1]}" in code, f"{command}: nothing reads {name}"


def test_command_line_from_a_shell(tmp_path: Path) -> None:
    def histoscale(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "histoscale.launch.cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert "did you mean 'pretrain'" in histoscale("pretran").stderr
    missing = histoscale("doctor", "out=d", "store=none.svs")
    assert missing.returncode == 2 and "FAIL store" in missing.stdout and "none.svs: no such file" in missing.stderr
    good = histoscale("doctor", "out=d")
    assert good.returncode == 0 and "OpenSlide" in good.stdout
    assert json.loads((tmp_path / "d" / "summary.json").read_text())["doctor"]["openslide"]["ok"]
    assert "store" not in json.loads((tmp_path / "d" / "summary.json").read_text())["doctor"]  # it was not asked for again
    bad = histoscale("doctor", "otu=d")
    assert bad.returncode == 2 and len(bad.stderr.strip().splitlines()) == 1 and "did you mean 'out'" in bad.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_was_deleted_meanwhile_holds_no_result(
    toy: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    out = tmp_path / "o"

    def run(config: ToyConfig, journal: Journal) -> dict[str, Any]:
        shutil.rmtree(out)
        out.mkdir()  # by what writes into it
        (out / "made.txt").touch()
        if fails:
            raise FileNotFoundError("of half a file")
        return {}

    monkeypatch.setattr(run_module.load("toy", []).module, "run", run)
    with pytest.raises(lease.Lost, match=f"^{out} was deleted or moved while this run wrote to it"):
        invoke("toy", ["size=1", f"out={out}"])
    assert [path.name for path in out.iterdir()] == ["made.txt"]


def test_what_a_killed_run_left_half_written_goes(toy: list[int], tmp_path: Path) -> None:
    invoke("toy", ["size=3", f"out={tmp_path}"])
    state = tmp_path / "state.json"
    state.write_text(state.read_text().replace('"done"', '"running"'))  # as SIGKILL leaves it
    (tmp_path / "deep").mkdir()
    for name in ("summary.json.4194305.partial", "deep/a.7.partial", "notes.partial", "a.b.partial"):
        (tmp_path / name).touch()
    assert invoke("toy", ["size=3", f"out={tmp_path}"])["toy"] == {"size": 3}
    assert sorted(path.name for path in tmp_path.rglob("*.partial")) == ["a.b.partial", "notes.partial"]
