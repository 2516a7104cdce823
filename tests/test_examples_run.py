"""Every example is typed: README from top to bottom in an empty folder, then each --help, in a real shell, by the letter.

What a machine without a network, eight GPUs or an hour cannot finish stands in WAYS with its reason, by its exact words.
"""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from child_fixtures import end
from example_world import World, lay
from examples import Example, of_help, of_readme, of_up

from histoscale.launch.loopback import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
HELP = "cohort manifest index fetch pretrain release probe embed mil compare robustness doctor bench demo".split()


@dataclass(frozen=True)
class Composes:
    """Only composed. why: what it would take."""

    why: str


@dataclass(frozen=True)
class Stops:
    """Started, and stopped by `by` when `until` (a pattern in the folder) is there; ends with `code` and the sentence `says`.
    then: keys behind its own with which the same line is run to the end, where later examples need what it makes."""

    until: str
    by: signal.Signals
    code: int
    says: str
    then: str | None = None


@dataclass(frozen=True)
class Refused:
    """The world is a part of what the line asks for: refused in words, then run with `then` behind its own keys."""

    says: str
    then: str


@dataclass(frozen=True)
class Fetches:
    """Runs up to its first request, which must ask for `host`."""

    host: str


CTRL_C = {"by": signal.SIGINT, "code": 130, "says": "the same command goes on"}
TERM = {"by": signal.SIGTERM, "code": 75, "says": "the same command continues"}
SUITE = Composes("is this very suite")
LONG = Composes("measures for many minutes, by design; tests/test_bench*.py run it with smaller values")
RANKS = Composes("eight processes with a GPU each, and a folder that they share")
SMALL = "schedule.steps=2 optim.global_batch=16"
WAYS: dict[str, Composes | Stops | Refused | Fetches] = {
    "python3 launch/up.py demo": Stops("outputs/demo/cohort/slides/*", **CTRL_C),
    "python3 launch/up.py demo out=runs/demo": Stops("runs/demo/cohort/slides/*", **CTRL_C),
    "histoscale demo": Stops("outputs/demo/cohort/slides/*", **CTRL_C),
    "histoscale demo out=runs/demo seed=1": Stops("runs/demo/cohort/slides/*", **CTRL_C),
    "python3 launch/up.py test": SUITE,
    "python3 launch/up.py test all": SUITE,
    "python3 launch/up.py test -n 0 tests/test_index.py": SUITE,
    "python3 launch/up.py audit database=advisories": Composes("needs saved advisories; tests/test_supply.py writes some"),
    "python3 launch/up.py licences": Composes("writes into the checkout; tests/test_supply.py reads what it would write"),
    "python3 launch/up.py pin --upgrade": Composes("asks the package index for everything, and writes into the checkout"),
    "histoscale pretrain catalog=runs/catalog recipe=demo out=runs/pretrain": Stops(
        "runs/pretrain/metrics.jsonl", **TERM, then=SMALL
    ),
    "histoscale pretrain catalog=runs/catalog recipe=dinov2_vits14 out=runs/vits14": Stops(
        "runs/vits14/parameters-base.tsv", **TERM
    ),
    "histoscale pretrain catalog=runs/catalog recipe=one_gpu_hour start.weights=weights/model.safetensors out=runs/hour": Stops(
        "runs/hour/parameters-base.tsv", **TERM
    ),
    "histoscale pretrain catalog=runs/catalog recipe=kaiko_vits16_dino start.weights=weights/dino.safetensors "
    "out=runs/kaiko": Stops("runs/kaiko/parameters-base.tsv", **TERM),
    "histoscale pretrain catalog=runs/catalog recipe=demo out=runs/small": Stops("runs/small/metrics.jsonl", **TERM),
    "histoscale pretrain catalog=runs/catalog recipe=demo 'longer=[200]' out=runs/small": Composes(
        "400 steps; tests/test_pretrain_cli.py goes on with a finished run in few"
    ),
    "histoscale pretrain tiles=tiles recipe=demo out=runs/tiles": Stops("runs/tiles/metrics.jsonl", **TERM),
    "histoscale pretrain \"tiles='az://container/train-{000..041}.tar'\" recipe=demo out=runs/shards": Stops(
        "runs/shards/metrics.jsonl", **TERM
    ),
    "histoscale pretrain catalog=runs/catalog recipe=midnight_vitg14 'phase=[high_resolution]' out=runs/phases": Composes(
        "1.1 billion parameters: 18 GB of weights and moments alone"
    ),
    "torchrun --nproc-per-node 8 -m histoscale.launch.pretrain catalog=az://container/catalog recipe=dinov2_vits14 "
    "out=/shared/run": RANKS,
    "histoscale cohort out=runs/cohort": Stops("runs/cohort/slides/*", **CTRL_C, then="cohort=tiny"),
    "histoscale cohort cohort=full cohort.seed=3 out=runs/full_cohort": Stops("runs/full_cohort/slides/*", **CTRL_C),
    "histoscale fetch dataset=crc data_root=~/data": Fetches("zenodo.org"),
    "histoscale fetch dataset=pcam data_root=~/data/pcam": Fetches("zenodo.org"),
    "histoscale fetch dataset=crc data_root=~/data/crc mirror=https://example.org/nct-crc-he": Fetches("example.org"),
    "histoscale manifest collection=panda root=~/data/panda collection.noisy=train_with_noisy_labels.csv out=runs/panda": Refused(
        "collection.counts=any", "collection.counts=any"
    ),
    "histoscale probe encoder=runs/release dataset=crc data_root=~/data out=runs/crc": Refused(
        "dataset.counts=any", "dataset.counts=any"
    ),
    "histoscale probe encoder=hf:~/models/phikon dataset=crc data_root=~/data 'protocols=[honest,eva]' "
    "out=runs/phikon_crc": Refused("dataset.counts=any", "dataset.counts=any"),
    "histoscale probe encoder=hf:~/models/phikon dataset=pcam data_root=~/data/pcam 'protocols=[honest,eva]' "
    "out=runs/phikon_pcam": Refused("dataset.counts=any", "dataset.counts=any"),
    "histoscale probe encoder=timm:vit_small_patch14_dinov2.lvd142m dataset=folder data_root=tiles out=runs/lvd_own": Fetches(
        "huggingface.co"
    ),
    "histoscale robustness encoder=timm:vit_small_patch14_dinov2.lvd142m registered=plism out=runs/plism": Fetches(
        "huggingface.co"
    ),
    # a quarter of an hour of curves of a ViT-S under every stain; tests/test_robustness_cli.py runs a small one to its end
    "histoscale robustness encoder=runs/release dataset=folder data_root=sites out=runs/sites": Stops(
        "runs/sites/features/*", **TERM
    ),
    "histoscale robustness encoder=hf:~/models/phikon dataset=folder data_root=camelyon robustness=pathorob_camelyon "
    "out=runs/pathorob": Stops("runs/pathorob/features/*", **TERM),
    "histoscale bench what=read catalog=runs/catalog sampler.grid=8 'sampler.mpps=[0.25]' 'sampler.weights=[1]' "
    "out=runs/bench_grid": Composes("8 x 8 patches at 0.25 um/px need larger slides than these"),
    "histoscale robustness encoder=runs/release dataset=cohort data_root=runs/cohort out=runs/cohort_sites": Stops(
        "runs/cohort_sites/features/*", **TERM
    ),
    "histoscale bench what=read out=runs/bench": LONG,
    "histoscale bench what=catalog out=runs/bench_catalog": LONG,
    "histoscale bench what=remote catalog=runs/catalog out=runs/bench_remote": LONG,
    "histoscale bench what=views out=runs/bench_views": LONG,
    "histoscale bench what=train train.recipe=demo out=runs/bench_train": LONG,
    "histoscale bench what=probe rounds=1 out=runs/bench_probe": LONG,
    "histoscale bench what=mil rounds=3 out=runs/bench_mil": LONG,
    "histoscale bench what=soak out=runs/bench_soak": LONG,
}


def key_of(example: Example) -> str:
    """Its words, one blank between two, without its comment."""
    return " ".join(example.text.split(" #")[0].replace("\\\n", " ").split())


def in_reading_order() -> list[Example]:
    """README, then each --help; a line that was typed before is not typed again."""
    found: dict[str, Example] = {}
    for one in [*of_readme(README), *(one for command in HELP for one in of_help(command)), *of_up()]:
        found.setdefault(key_of(one), one)
    return list(found.values())


EXAMPLES = in_reading_order()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, azure_server: Server) -> World:
    (shown,) = (one.text for one in of_readme(README) if one.kind == "csv")
    return lay(tmp_path_factory.mktemp("examples"), shown, azure_server)


def test_every_exception_is_of_an_example() -> None:
    """A changed example is no longer excused, and is run as it stands."""
    assert WAYS.keys() <= {key_of(one) for one in EXAMPLES}


TYPED = [one for one in EXAMPLES if not isinstance(WAYS.get(key_of(one)), Composes)]  # tests/test_examples.py composes all


@pytest.mark.parametrize("example", TYPED, ids=lambda one: f"{one.where}: {key_of(one)[:70]}")
def test_typed_as_it_stands(world: World, example: Example) -> None:
    way = WAYS.get(key_of(example))
    if isinstance(way, Stops):
        stopped(world, example.text, way)
    elif isinstance(way, Refused):
        code, said = typed(world, example.text)
        assert code == 2 and way.says in said, said
        finished(world, f"{key_of(example)} {way.then}")
    elif isinstance(way, Fetches):
        assert first_request(world, example.text) == way.host
    else:
        RUN[example.kind](world, example.text)


def finished(world: World, line: str) -> None:
    code, said = typed(world, line)
    assert code == 0 and "Traceback" not in said, said


def python_block(world: World, block: str) -> None:
    """In an interpreter that has imported what it names."""
    finished(world, f"python3 <<'END'\nimport timm, torch, transformers\n{block}\nEND")


def table(world: World, block: str) -> None:
    """The manifest of the README, by the letter: both of its slides are there."""
    (world.folder / "as_shown.csv").write_text(block + "\n")
    code, said = typed(world, "histoscale index manifest=as_shown.csv out=runs/as_shown")
    assert code == 0 and "accepted 2 slides, rejected 0" in said, said


RUN = {"sh": finished, "python": python_block, "csv": table}


def typed(world: World, line: str) -> tuple[int, str]:
    """Exit code, and all that it says, of a line in a shell."""
    place = {"cwd": world.folder, "env": world.environment, "stdin": subprocess.DEVNULL}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, **place)  # type: ignore[call-overload]
    return done.returncode, f"$ {line}\n{done.stdout}{done.stderr}"


def started(line: str, world: World, environment: dict[str, str], **streams: Any) -> subprocess.Popen[Any]:
    """A line as a terminal starts it: what runs in the background, as CI may, ignores Ctrl-C, and so do its children."""
    return subprocess.Popen(
        ["bash", "-c", line], cwd=world.folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **streams,
    )  # fmt: skip


def stopped(world: World, line: str, way: Stops) -> None:
    place = world.folder / way.until
    out = world.folder / "/".join(way.until.split("/")[:2])
    shutil.rmtree(out, ignore_errors=True)
    with (world.folder / "said").open("w+") as said:
        child = started(line, world, world.environment, stdout=said, stderr=said)
        try:
            while child.poll() is None and not any(place.parent.glob(place.name)):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(0.05)
            if way.by is signal.SIGINT and child.poll() is None:
                os.killpg(child.pid, way.by)  # as a terminal sends it
            else:
                child.send_signal(way.by)
            code = child.wait()
        finally:
            end(child)
        said.seek(0)
        text = said.read()
    if way.then is not None:  # later examples go on whatever is said of this one
        shutil.rmtree(out)
        finished(world, f"{line.split(' #')[0]} {way.then}")
    assert code == way.code and way.says in text and "Traceback" not in text, f"{code}\n{text}"


def first_request(world: World, line: str) -> str:
    """The host that a line asks for first, at an empty home; every request of it comes here, and it is stopped after that one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        through = {f"{scheme}_proxy": f"http://127.0.0.1:{server.getsockname()[1]}" for scheme in ("http", "https")}
        environment = {**world.environment, **through, "HOME": str(world.folder / "nothing")}
        del environment["HF_HUB_OFFLINE"]
        child = started(line, world, environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            server.settimeout(120)
            with server.accept()[0] as asked:
                first = asked.makefile().readline()
                os.killpg(child.pid, signal.SIGINT)
                said = child.communicate()[1]
        finally:
            end(child)
    assert child.returncode == 130 and "Traceback" not in said, said
    return first.split()[1].split(":")[0]
