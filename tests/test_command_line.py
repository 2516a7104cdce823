"""What a user types: values to the letter, mistakes named, answers without the weight of what the command would run."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from histoscale.launch import robustness
from histoscale.launch.config import COMMANDS, FREE, choices, flatten, load, schema_keys, shown
from histoscale.launch.explain import help_text
from histoscale.launch.overrides import ConfigError, read_overrides
from histoscale.launch.paths import ANYWHERE, ON_DISK
from histoscale.launch.run import execute

HEAVY = ("numpy", "torch", "timm", "torchvision", "sklearn", "transformers", "pydantic", "fsspec")


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(name=NAMES)
@example("a b/é,#&'()[]=.csv")
@example("it's \\'quoted\\")
@example("2024")
@example("[a]")
@example("{a: b}")
@example("a,b")
def test_a_path_is_taken_to_the_letter(name: str) -> None:
    [override] = read_overrides("index", [f"manifest=folder/{name}"])
    assert override.value() == f"folder/{name}"


@given(value=st.text(st.sampled_from("ab=+/, #é'&()"), min_size=1, max_size=12).filter(lambda v: "," not in v and v.strip() == v))
@settings(max_examples=100, deadline=None)
def test_so_is_the_value_of_an_option(value: str) -> None:
    [override] = read_overrides("doctor", [f"storage.options.az.account_key={value}"])
    assert (len(value) > 1 and value[0] == value[-1] == "'") or str(override.value()) == value


def test_a_line_to_paste_arrives_as_it_was_meant() -> None:
    dataset = SimpleNamespace(name="crc")
    config: Any = SimpleNamespace(encoder="hf:my models/x", dataset=dataset, data_root="it's here", out="a (b)")
    words = shlex.split(robustness._next(config).partition("histoscale ")[2])
    found = {override.key_or_group: override.value() for override in read_overrides("probe", words[1:])}
    assert words[0] == "probe"
    assert found == {"encoder": "hf:my models/x", "dataset": "crc", "data_root": "it's here", "out": "a (b)_probe"}
    config.data_root = None
    words = shlex.split(robustness._next(config).partition("histoscale ")[2])
    assert words == ["robustness", "encoder=hf:my models/x", "data_root=TILES"]


def test_odd_names_arrive() -> None:
    config = load("index", ["manifest=a b/é,#&'()[]=.csv", "out=it's {here}", "storage.options.az.account_key=a+b/c=="]).config
    assert (config.manifest, config.out) == ("a b/é,#&'()[]=.csv", "it's {here}")
    assert config.storage.options == {"az": {"account_key": "a+b/c=="}}


def test_what_hydra_reads_keeps_its_meaning() -> None:
    words = ["embeddings='quoted name'", "manifest=m", "catalog=null", "split=patients"]
    config = load("mil", [*words, "task=classes", "task.label=grade", "task.classes={low: [1], high: [2, 3]}"]).config
    assert (config.embeddings, config.catalog, config.task.classes) == ("quoted name", None, {"low": ["1"], "high": ["2", "3"]})
    roles = load("pretrain", ["recipe=demo", "catalog=c", "out=o", "roles=[São Paulo, train]"]).config.roles
    assert roles == ["São Paulo", "train"]


def test_the_home_directory_is_named_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    config = load("probe", ["encoder=hf:~/models/x", "data_root=~/data", "dataset=crc", "out=~"]).config
    assert (config.encoder, config.data_root, config.out) == ("hf:/home/user/models/x", "/home/user/data", "/home/user")
    assert load("compare", ["runs=[~/a, b~/c]"]).config.runs == ["/home/user/a", "b~/c"]
    assert load("pretrain", ["recipe=demo", "catalog=c", "out=o", "phases.more.catalog=~/d"]).values["phases"]["more"] == {
        "catalog": "/home/user/d"
    }


REQUIRED = {
    "manifest": ["root=r", "collection=panda"], "index": ["manifest=m"], "pretrain": ["recipe=demo"], "release": ["checkpoint=c"],
    "fetch": ["dataset=crc", "data_root=d"], "probe": ["encoder=e", "data_root=d"], "compare": ["runs=[a]"],
    "embed": ["encoder=e", "catalog=c"], "mil": ["embeddings=e", "manifest=m"], "robustness": ["encoder=e"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "uri"),
    [*((command, "az://container/results") for command in COMMANDS), ("index", "s3:/b"), ("index", "file:///x/y"), ("demo", "https://h/x")],
)
def test_no_command_writes_to_a_uri(command: str, uri: str) -> None:
    with pytest.raises(ConfigError, match=rf"out={uri}.*(out=/x/y|copy it when it is done)"):
        load(command, [*REQUIRED.get(command, []), f"out={uri}"])


def test_what_is_read_from_a_disk_says_so() -> None:
    with pytest.raises(ConfigError, match="embeddings= is read from a disk: copy it here first"):
        load("mil", ["embeddings=s3://bucket/stores", "manifest=s3://bucket/m.csv"])
    with pytest.raises(ConfigError, match="data_root=az://c/crc is in an object store"):
        load("probe", ["encoder=e", "dataset=crc", "data_root=az://c/crc"])
    assert load("probe", ["encoder=e", "dataset=cohort", "data_root=az://c/cohort"]).config.catalog == "az://c/cohort/catalog"
    with pytest.raises(ConfigError, match="runs=az://c/b is in an object store"):
        load("compare", ["runs=[a, az://c/b]"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_required_or_optional_text_is_known_as_a_path_or_not(command: str) -> None:
    """A new key that holds a path must be listed, or its odd characters would be read as grammar."""
    schema = schema_keys(__import__(f"histoscale.launch.{command}", fromlist=["Config"]).Config)
    assert {key for key, free in schema.items() if free} <= set(FREE)
    needed = {key for key, value in flatten(shown(command, [])).items() if value == "???"}
    assert needed <= ANYWHERE | ON_DISK | {"recipe", "dataset", "collection", "task.label"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["index", "manifst=x"], "unknown key 'manifst'; did you mean 'manifest'?"),
        (["index", "+manifst=x"], "unknown key 'manifst'; did you mean 'manifest'?"),
        (["probe", "dataset=crcc"], "dataset=crcc is no choice of dataset; did you mean 'crc'? There are: bach, .*, tp53"),
        (["pretrain", "recipe=demo", "views/blur=blur_intendd"], "did you mean 'blur_intended'"),
        (["pretrain", "recipe=demo", "phase=[gramm]"], "did you mean 'gram'"),
        (["mil", "mil=mean", "mil.aggregator.attention=3"], "unknown key .*, which only mil=abmil, .* have"),
        (["index", "mil=abmil"], "index has no group mil; its groups are tissue, storage, logging"),
        (["doctor", "logging={progres: off}"], "unknown key 'logging.progres'; did you mean 'logging.progress'?"),
        (["mil", "task.classes={hé: [1]}"], "'é' stands in it: put the text that holds it in quotes"),
        (["doctor", "~out"], "deletes a key"),
        (["doctor", "out="], "out= is empty: give a path"),
        (["index", "manifest="], "manifest= is empty: give a path"),
        (["compare", "runs=['']"], "runs= is empty: give a path"),
        (["doctor", "hydra.run.dir=x"], "hydra.run.dir= is a key of Hydra's launcher, .* the folder of results is out="),
        *((["pretrain", "recipe=demo", "catalog=c", "out=o", f"{key}={value}"],
           f"{key}={value}: expected a number of steps, such as {key}=1000")
          for key, value in (("schedule.steps", "100k"), ("schedule.steps", "null"), ("schedule.horizon", "far"),
                             ("phases.a.schedule.steps", "abc"))),
        (["doctor", "--verbose"], "is a flag"),
        (["pretrain"], "pretrain needs recipe=" + ".".join(choices("recipe"))),
        (["fetch"], "fetch needs dataset=bach.*data_root="),
    ],
)  # fmt: skip
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        load(words[0], words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_configuration_is_shown_before_anything_is_given(command: str) -> None:
    values = shown(command, [])
    assert "out" in values and "logging" in values
    if command == "pretrain":
        assert values["recipe"] == "???"
    if command in ("probe", "embed"):
        assert values["encoder"] == "???"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_choice_and_on_request_every_key(command: str) -> None:
    text, all_of_it = help_text(command), help_text(command, everything=True)
    assert "# logging=default" in all_of_it and "  logging " in text
    if command == "pretrain":
        assert all(name in text for name in choices("recipe")) and "lanes_per_slot" in all_of_it and "lanes_per_slot" not in text


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["pretrain", "--help"], ["mil", "--help", "all"], ["probe", "--cfg", "dataset=crc"],
     ["index", "manifst=x"], ["probe", "dataset=crcc"], ["pretrain"], ["index", "manifest=m", "out=az://c/r"], ["nonsense"]],
)  # fmt: skip
def test_answers_need_none_of_the_weight(words: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from histoscale.launch.cli import main; code = main(); "
        f"print(code, *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True)
    code, *imported = done.stderr.splitlines()[-1].split()
    assert code in ("0", "2") and (done.stdout or len(done.stderr.splitlines()) > 1) and not imported, imported
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_write_that_another_rank_cannot_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Unbuffered(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Unbuffered())
    assert execute("index", ["manifst=x"]) == 2
    (line,) = written
    assert line.endswith("did you mean 'manifest'?\n")


@pytest.mark.parametrize("words", [["pretrain", "--help"], ["pretrain", "--cfg"], ["--help"]])
def test_a_reader_who_stops_reading_sees_no_traceback(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "histoscale.launch.cli", *words]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
