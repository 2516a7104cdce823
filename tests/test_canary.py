"""A credential that is given to a command is in nothing that the command leaves or says, however it ends: it is the canary."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from loopback_fixtures import upload
from test_pretrain_cli import SMALL

from histoscale.data import secrets
from histoscale.launch.config import COMMANDS, choices, composed, groups
from histoscale.launch.loopback import ACCOUNT_KEY, Server, connection_string
from histoscale.launch.run import execute, invoke

CANARY = "cAnArY0123456789/+x"
KEY = base64.b64encode(CANARY.encode()).decode()  # of an account that is another's
NOWHERE = f"http://someone:{CANARY}@127.0.0.1:1/x"
OPTIONS = [
    f"storage.options.s3.secret={CANARY}",
    f"storage.options.az.connection_string='{connection_string('http://127.0.0.1:1', KEY)}'",
    f"storage.options.http.client_kwargs.headers.Authorization='Bearer {CANARY}'",
]  # fmt: skip
ABSENT = {  # what makes a command fail that needs nothing, or something else first
    "demo": ["stages.cohort=[cohort=none]"],
    "pretrain": ["catalog=absent"],
    "robustness": ["data_root=absent"],
    "bench": ["catalog=absent"],
    "doctor": ["store=absent"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--log-dir", "logs", "--redirects", "3", "--nproc-per-node", "2"]
ROOM = ["sampler.patch_px=32", "sampler.mpps=[0.5]", "sampler.weights=[1]", "sampler.grid=2"]
LONGER = ["schedule.steps=400", "stream.workers=1", "logging.progress=lines", "logging.interval_s=0"]


def canaries(folder: Path, said: str, *names: str) -> list[str]:
    """Where one of the names stands: files below the folder, and what was said."""
    left = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    parts = [re.match(r"\w+", name)[0].encode() for name in names]  # type: ignore[index]  # up to what a URL would quote
    assert min(map(len, parts)) >= 16
    return [place for place, data in {**left, "said": said.encode()}.items() if any(part in data for part in parts)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_fails_shows_no_canary(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its configuration; refused for what it was given, and, where it opens stores, failing at its work with their options: in a
    plain process with its traceback, and on a rank, where a known error is none of torchrun's file."""
    monkeypatch.setattr(secrets, "_known", ())
    monkeypatch.chdir(tmp_path)
    before = sys.stdout, sys.stderr
    tree, missing = composed(command, [])

    def words(value: str) -> list[str]:
        given = [f"{name}={choices(name)[0]}" if name in groups() else f"{name}={value}" for name in missing]
        return [*given, *(OPTIONS if "storage" in tree else ())]

    lines = [[*words(NOWHERE), f"out={NOWHERE}"]]
    execute(command, [*lines[0], "--cfg"])
    if "storage" in tree:
        lines.append([*words("absent"), *ABSENT.get(command, ()), "out=out"])
    for line in lines:
        monkeypatch.setenv("HISTOSCALE_TRACEBACK", "1")
        code = execute(command, line)
        with monkeypatch.context() as rank, pytest.raises(SystemExit) as failed:
            rank.setenv("TORCHELASTIC_RUN_ID", "x")
            rank.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
            execute(command, line)
        sys.stdout, sys.stderr = before
        said = "".join(capfd.readouterr())
        assert code == failed.value.code == 2 and "Traceback" in said and not (tmp_path / "error.json").exists()
        assert ("names a user or a password" in said) == (line is lines[0]), said
        assert canaries(tmp_path, said, CANARY, KEY) == []


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, make_slide: Callable[..., Path]) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("slides")
    for i in range(2):
        make_slide(folder / f"{i}.svs", seed=i)
    (folder / "manifest.csv").write_text("slide_id,uri,patient_id,site,role\ns0,0.svs,p0,SP,train\ns1,1.svs,p1,SE,train\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["az", "az by obstore", "az by environment", "s3", "http"])
def store(request: pytest.FixtureRequest, slides: dict[str, bytes]) -> Iterator[tuple[str, list[str], dict[str, str], str]]:
    """(URI of a folder with the slides, words that open it, variables of the shell, the canary)."""
    kind, _, how = request.param.partition(" by ")
    if kind == "az":
        connection = connection_string(request.getfixturevalue("azure_server").url)
        root, option = upload(connection, slides, "canary"), f"storage.options.az.connection_string='{connection}'"
        by_environment = {"AZURE_STORAGE_CONNECTION_STRING": connection} if how == "environment" else {}
        yield root, [] if by_environment else [option, f"storage.backend={how or 'fsspec'}"], by_environment, ACCOUNT_KEY
    elif kind == "http":
        server, folder = request.getfixturevalue("folder_server")
        for name, data in slides.items():
            (folder / name).write_bytes(data)
        yield server.url, [f"storage.options.http.client_kwargs.headers.X-Access='{CANARY}'"], {}, CANARY
    else:
        boto3 = pytest.importorskip("boto3")
        url = request.getfixturevalue("aws_server").url
        client = boto3.client("s3", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1")
        client.create_bucket(Bucket="canary")
        for name, data in slides.items():
            client.put_object(Bucket="canary", Key=name, Body=data)
        words = [f"storage.options.s3.{name}={value}" for name, value in (("key", "AKIACANARY"), ("secret", CANARY))]
        yield "s3://canary", [*words, f"storage.options.s3.endpoint_url={url}"], {}, CANARY


Start = Callable[[list[str], dict[str, str]], "subprocess.Popen[str]"]


@pytest.fixture
def python(start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path) -> Start:
    """Arguments of Python and variables of the shell: started in `tmp_path`."""

    def started(arguments: list[str], more: dict[str, str]) -> "subprocess.Popen[str]":
        names = ("AZURE_", "AWS_", "WANDB_")
        shell = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        shell |= {"OMP_NUM_THREADS": "1", "NETRC": str(tmp_path / "netrc"), "HISTOSCALE_TRACEBACK": "1", **more}
        return start([sys.executable, *arguments], cwd=tmp_path, env=shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return started


@pytest.mark.slow
def test_no_canary_is_left_by_commands_on_a_store(
    store: tuple[str, list[str], dict[str, str], str], python: Start, tmp_path: Path
) -> None:
    """One process types them all, since what they share is what may leak; its own arguments hold the canary."""
    root, opened, shell, canary = store
    commands = [
        ["index", f"manifest={root}/manifest.csv", "out=catalog", "workers=1", *opened],
        ["doctor", f"store={root}/0.svs", "out=doctor", *opened],
        ["pretrain", *SMALL, "catalog=catalog", "out=run", "logging.wandb=offline", "logging.tensorboard=true", *opened],
        ["pretrain", *SMALL, "catalog=catalog", "out=run", "storage.deadline_s=100", *opened],  # continues; notes what changed
        ["release", "checkpoint=run", "out=release"],
        ["embed", "encoder=release", "catalog=catalog", "out=stores", "precision=fp32", "hardware.device=cpu", *opened],
        ["bench", "catalog=catalog", "out=bench", "rounds=1", "visits=2", "batch=8", *ROOM, *opened],
        ["mil", "embeddings=stores", f"manifest={root}/manifest.csv", "catalog=catalog", "task.label=site", "out=mil", *opened],
        ["probe", "encoder=release", "dataset=cohort", "data_root=.", "catalog=catalog", "out=probe", *opened],
        ["index", f"manifest={root}/none.csv", "out=none", *opened],
    ]
    code = "import json, sys; from histoscale.launch.run import execute\n"
    code += "print('codes', [execute(one[0], one[1:]) for one in json.loads(sys.argv[1])])"
    said = python(["-c", code, json.dumps(commands)], shell).communicate(timeout=300)[0]
    assert "codes [0, 0, 0, 0, 0, 0, 0, 2, 2, 2]" in said, said
    for why in ("mil: TaskError: the manifest has no label column", "./patches.parquet: no such file", "none.csv: no such file"):
        assert why in said, said
    assert any((tmp_path / "run/wandb").rglob("*.wandb")) and any((tmp_path / "run/tensorboard").iterdir())
    assert canaries(tmp_path, said, canary) == []


@pytest.fixture(scope="module")
def indexed(azure_server: Server, slides: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A catalog of slides on az://, and the option that opens them."""
    connection, catalog = connection_string(azure_server.url), tmp_path_factory.mktemp("indexed") / "catalog"
    root, option = upload(connection, slides, "canary"), f"storage.options.az.connection_string='{connection}'"
    invoke("index", [f"manifest={root}/manifest.csv", f"out={catalog}", "workers=0", "logging.progress=off", option])
    return catalog, option


@pytest.fixture
def run(indexed: tuple[Path, str], tmp_path: Path) -> list[str]:
    """Words of a pretrain on az://, with a worker and trackers."""
    catalog, option = indexed
    shutil.copytree(catalog, tmp_path / "catalog")
    return ["-m", "histoscale.launch.pretrain", *SMALL, *LONGER, "catalog=catalog", "out=run", "logging.wandb=offline",
            "logging.tensorboard=true", option]  # fmt: skip


def stop(child: psutil.Process) -> None:
    child.send_signal(signal.SIGTERM)


def kill_a_worker(child: psutil.Process) -> None:
    """A child of the server that forks them; wandb has children too."""
    [server] = [one for one in child.children() if "forkserver" in " ".join(one.cmdline())]
    [worker] = server.children()
    worker.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("happens", "code"), [(stop, 75), (kill_a_worker, 2)])
def test_no_canary_is_left_by_a_run_that_is_broken_off(
    run: list[str], python: Start, happens: Callable[[psutil.Process], None], code: int, tmp_path: Path
) -> None:
    child, said = python(run, {}), ""
    assert child.stdout is not None
    for line in child.stdout:
        said += line
        if "pretrain: 2/400" in line:
            happens(psutil.Process(child.pid))
    assert child.wait(60) == code, said
    assert canaries(tmp_path, said, ACCOUNT_KEY) == []


@pytest.mark.slow
@pytest.mark.parametrize(("word", "code"), [("schedule.steps=4", 0), (f"storage.deadline_s={NOWHERE}", 1), ("wrong key", 1)])
def test_no_canary_is_left_under_torchrun(run: list[str], python: Start, word: str, code: int, tmp_path: Path) -> None:
    """A run that ends well, one whose configuration is refused for what looks like a password, and one whose store refuses it;
    torchrun's logs are looked at."""
    words = [each.replace(ACCOUNT_KEY, KEY) for each in run] if word == "wrong key" else [*run, word]
    child = python([*TORCHRUN, *words], {})
    said = child.communicate(timeout=200)[0]
    assert child.returncode == code and any((tmp_path / "logs").rglob("stderr.log")), said
    assert canaries(tmp_path, said, ACCOUNT_KEY, KEY, CANARY) == []
