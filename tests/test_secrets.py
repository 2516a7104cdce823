"""Credentials are left nowhere, and results that hold none are written as they are: whatever their keys and texts sound like."""

import errno
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_fixtures import write_store
from numpy.random import default_rng

from histoscale.data import journal as writing
from histoscale.data import secrets
from histoscale.data.journal import Journal, JournalConfig, append_rows, write_atomic, write_json, write_rows, write_text
from histoscale.data.ranks import open_ranks
from histoscale.data.secrets import hide, hide_options, scrub, scrubbed
from histoscale.eval.evidence.page import _render
from histoscale.eval.page import Chapter, Prose, write_page
from histoscale.launch import run as run_module
from histoscale.launch.run import RankFailed, execute, invoke
from histoscale.launch.trackers import tracked
from histoscale.pretrain.checkpoint import read_checkpoint, write_checkpoint

CANARY = "cAnArY0123456789"
WORDS = (
    "sp", "SE", "sig", "sv", "token", "secret", "signature", "authorization", "password", "key", "credential", "SP=0.5", "a b",
    "token: 3", "sig=1&se=2", "bearer of instruments", "C:\\sp", 'a "quoted" secret', "é", "", "a\nb", "storage", "options",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a known credential in one test is none in the next."""
    monkeypatch.setattr(secrets, "_known", ())


def quiet(out: Path) -> Journal:
    return Journal(out, JournalConfig("off", 10, "off", "test", False))


# Results are what they were.

TEXTS = st.sampled_from(WORDS) | st.text(max_size=8) | st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join)
LEAVES = TEXTS | st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.sampled_from([word for word in WORDS if word not in ("storage", "options")]) | st.text(max_size=4)
VALUES = st.dictionaries(
    KEYS, st.recursive(LEAVES, lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3)), max_size=4
)


def through_summary(folder: Path, values: dict[str, Any]) -> Any:
    quiet(folder).summary(values)
    return json.loads((folder / "summary.json").read_text())


def through_row(folder: Path, values: dict[str, Any]) -> Any:
    quiet(folder).row(**{"values": values})
    return json.loads((folder / "metrics.jsonl").read_text())["values"]


def through_json(folder: Path, values: dict[str, Any]) -> Any:
    write_json(folder / "a.json", values, compact=True)
    return json.loads((folder / "a.json").read_text())


def through_rows(folder: Path, values: dict[str, Any]) -> Any:
    write_rows(folder / "a.jsonl", [values])
    append_rows(folder / "a.jsonl", [values])
    first, second = map(json.loads, (folder / "a.jsonl").read_text().split("\n")[:-1])
    assert first == second
    return first


def through_checkpoint(folder: Path, values: dict[str, Any]) -> Any:
    ranks = open_ranks("cpu")
    return read_checkpoint(write_checkpoint(folder, 1, {"w": torch.zeros(1)}, {"values": values}, ranks)).facts["values"]


WRITERS = [through_summary, through_row, through_json, through_rows]


@pytest.mark.parametrize("writer", WRITERS)
@given(values=VALUES)
@settings(max_examples=50)
def test_values_come_out_of_every_writer_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, writer: Callable[[Path, dict[str, Any]], Any], values: dict[str, Any]
) -> None:
    assert writer(tmp_path_factory.mktemp("out"), values) == values


@given(values=VALUES)
@settings(max_examples=15)
def test_and_out_of_a_checkpoint(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    assert through_checkpoint(tmp_path_factory.mktemp("out"), values) == values


@given(text=TEXTS)
@settings(max_examples=30)
def test_pages_and_tables_show_texts_as_they_are(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("out")
    write_text(folder / "table.txt", text)
    assert (folder / "table.txt").read_bytes().decode() == text
    write_page(folder / "a.html", f"title {text}", "lead", {"fact": text}, [Chapter("c", [Prose(text or "none")])])
    shown = str(jinja2.Environment(autoescape=True).from_string("title {{ text }}").render(text=text))
    assert shown.replace("\r\n", "\n").replace("\r", "\n") in (folder / "a.html").read_text(encoding="utf-8")


def test_a_page_of_evidence_shows_what_sounds_secret(tmp_path: Path) -> None:
    template = "{{ a }}|{{ b }}"
    (tmp_path / "t.html").write_text(template)
    _render(tmp_path / "page.html", str(tmp_path / "t.html"), a="SP=0.5, sig=0.01", b=f"https://u:{CANARY}@h/x?sp=1")
    assert (tmp_path / "page.html").read_text() == "SP=0.5, sig=0.01|https://***@h/x?sp=***"


def test_a_study_of_the_hospitals_sp_and_se(tmp_path: Path) -> None:
    """The names of two hospitals, of an external one and of the classes are all names of parameters of signed URLs."""
    rng, rows = default_rng(3), ["slide_id,uri,patient_id,site,role,token"]
    for number in range(32):
        role = ("train", "train", "test", "external")[number % 4]
        label, site = ("sv", "sig")[number // 4 % 2], "SIGNATURE" if role == "external" else ("SP", "SE")[number // 8 % 2]
        features = rng.normal(size=(20, 4))
        features[:3, 0] += 8 * (label == "sig")
        write_store(tmp_path / "stores", f"s{number}", features)
        rows.append(f"s{number},s{number}.svs,p{number},{site},{role},{label}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    words = [f"embeddings={tmp_path / 'stores'}", f"manifest={tmp_path / 'manifest.csv'}", f"out={out}", "task.label=token",
             "task.positive=[sig]", "task.negative=[sv]", "mil.epochs=2", "mil.repeats=1", "interval.draws=50",
             "mil.folds=2", "logging.progress=off"]  # fmt: skip
    assert execute("mil", words) == 0
    files = [path for path in out.rglob("*.json*") if path.suffix in (".json", ".jsonl")]
    whole = {path.name: [json.loads(text) for text in texts(path)] for path in files}
    assert {"summary.json", "state.json", "config.json", "inputs.jsonl"} <= whole.keys()
    assert {"SP", "SE", "SIGNATURE"} <= whole["summary.json"][0]["mil"]["sites"].keys()
    for path in [*files, *(out / name for name in ("config.yaml", "report.html", "scores.csv"))]:
        assert "***" not in path.read_text(), path
    assert whole["state.json"][0]["result"]["task"]["positive"] == ["sig"]
    invoke("mil", words)  # it finds its own result, which is the one that it wrote


def texts(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def test_a_file_that_reads_back_otherwise_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before, sync = path.read_bytes(), writing.os.fsync

    def flip(descriptor: int) -> None:  # a disk that loses a bit between the write and the look
        sync(descriptor)
        writing.os.pwrite(descriptor, b"[", 0)

    monkeypatch.setattr(writing.os, "fsync", flip)
    with pytest.raises(OSError, match="a.json") as failed:
        write_atomic(path, '{"a": 2}')
    assert failed.value.errno == errno.EIO and path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_text_that_json_would_change_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.json"):
        write_json(tmp_path / "a.json", {"name": "\ud83d\ude00"})  # two halves, which would be read as one letter
    assert list(tmp_path.iterdir()) == []


# Credentials are.

OPTIONS = {"s3": {"key": "AKIA0123456789", "secret": CANARY, "endpoint_url": "http://host:1"},
           "az": {"connection_string": "AccountName=a;AccountKey=cXdlcnR5dWlvcA==;BlobEndpoint=http://b"},
           "abfs": {"sas_token": "?sv=2024&sig=a%2Bb%2Fc0123&se=1"},
           "http": {"client_kwargs": {"headers": {"X-Custom": "hunter2hunter2", "Authorization": "Bearer 0123456789abc"}}},
           "sftp": {"password": 123456, "anon": False}}  # fmt: skip


def test_known_credentials_are_known_anywhere() -> None:
    hide_options(OPTIONS)
    text = f"AKIA0123456789 {CANARY} cXdlcnR5dWlvcA== cXdlcnR5dWlvcA%3D%3D hunter2hunter2 a+b/c0123 0123456789abc http://host:1"
    assert scrub(text) == "*** *** *** *** *** *** *** http://host:1"
    assert scrubbed({"a": [text], text: 1}) == {"a": [scrub(text)], scrub(text): 1}


def test_a_configuration_keeps_its_keys_and_loses_its_credentials() -> None:
    shown = scrubbed({"storage": {"options": OPTIONS, "backend": "fsspec"}, "steps": 4, "name": "a"})
    assert shown["storage"]["options"] == {
        "s3": {"key": "***", "secret": "***", "endpoint_url": "http://host:1"}, "az": {"connection_string": "***"},
        "abfs": {"sas_token": "***"}, "http": {"client_kwargs": {"headers": {"X-Custom": "***", "Authorization": "***"}}},
        "sftp": {"password": "***", "anon": False},
    }  # fmt: skip
    assert (shown["storage"]["backend"], shown["steps"], shown["name"]) == ("fsspec", 4, "a")
    assert yaml.safe_load(yaml.safe_dump(shown)) == shown == scrubbed(shown)
    assert scrubbed({"storage.options.s3.secret": ["a", "b"], "connection-string": "x"}) == {
        "storage.options.s3.secret": ["***", "***"], "connection-string": "***"
    }  # fmt: skip


# As people write them for s3fs, adlfs, gcsfs, aiohttp and obstore: not one of these values is a secret, and some are words.
HARMLESS = {
    "s3": {"profile": "pathology", "config_kwargs": {"retries": {"mode": "adaptive"}, "s3": {"addressing_style": "path-style"},
           "defaults_mode": "in-region"}, "client_kwargs": {"region_name": "eu-central-1"}, "cache_type": "readahead"},
    "az": {"account_name": "histology", "location_mode": "secondary", "tenant_id": "pathologists", "container_name": "training"},
    "gs": {"access": "read_only", "consistency": "external", "default_location": "europe-west", "project": "melanoma"},
    "https": {"client_kwargs": {"headers": {"Accept-Encoding": "identity"}}, "size_policy": "get-head", "timeout": "a minute"},
    "abfs": {"client_options": {"default_content_type": "image/tiff", "user_agent": "histoscale"}, "credential_type": "workload"},
}  # fmt: skip


def test_options_that_are_no_credentials_rewrite_no_result() -> None:
    hide_options(HARMLESS)
    words = [text for _, text in secrets._texts(HARMLESS, "")]
    found = {"sites": words, "by site": {word: {"auc": 0.5, "told": f"{word} threshold"} for word in words}}
    assert secrets._known == () and scrubbed(found) == found and scrub(" ".join(words)) == " ".join(words)
    assert scrubbed({"storage": {"options": HARMLESS}}) == {"storage": {"options": HARMLESS}}


def test_keys_of_results_stay_apart() -> None:
    """What is taken for a secret may be a word: inside a key it stays; a key that is one, or a URL with one, loses it alone."""
    hide_options({"s3": {"unheard_of": "pathology", "secret": CANARY}})
    found = {"pathology of skin": 1, "pathology": 2, f"a {CANARY}": 3, f"https://h/x?sig={CANARY}": 4, "https://h/x?sig=b": 5,
             "b": 6}  # fmt: skip
    assert scrubbed(found) == {
        "pathology of skin": 1, "***": 2, "a ***": 3, "https://h/x?sig=***": 4, "https://h/x?sig=*** (5)": 5, "b": 6,
    }  # fmt: skip
    assert list(scrubbed({f"https://h/x?sig={CANARY}": 1, "https://h/x?sig=***": 2}).values()) == [1, 2]
    assert scrubbed(scrubbed(found)) == scrubbed(found)


FORMS = [  # in the values of results too
    f"https://a.blob.core.windows.net/c/x.svs?sv=2024&sig={CANARY}%3D", f"https://user:{CANARY}@host/x",
    f"s3://k:{CANARY}@bucket/x", f"https://{CANARY}@host/x", f"http://h/x?a=1&X-Amz-Signature={CANARY}",
    f"DefaultEndpointsProtocol=http;AccountKey={CANARY}==;B=c", f"SharedAccessSignature=sv=1&sig={CANARY}",
    f"http://user:p@{CANARY}@host", f"http://user:a/{CANARY}?@host:80/x", f"(see http://h/?access_token={CANARY}).",
    f"GET https://h/login?next=https://a.blob/y?sig={CANARY}", f"https://a/x?x=1,https://b/y?sig={CANARY}",
    f"https://h/back#access_token={CANARY}", f"https://h/back?a=1#state=1&id_token={CANARY}",
    f"https://h/?next=https%3A%2F%2Fa%2Fy%3Fse%3D1%26sig%3D{CANARY}", f"https://h/to/https%3a%2f%2fa%2fy%3fsig%3d{CANARY}",
    f"/login?next=https://a.blob/y?sig={CANARY}", f"https://h/x?a=1;sig={CANARY}", f"https://h/x?a=1&amp;sig={CANARY}",
]  # fmt: skip
FORMS_OF_TEXT = [
    f"?sv=2024&sig={CANARY}&se=1", f"GET /c/x.svs?se=1&sig={CANARY} failed", f"Authorization: Bearer {CANARY}",
    f"{{'Authorization': b'Basic {CANARY}'}}", f"client_secret={CANARY}", f"aws_session_token: {CANARY}",
    f"sent Bearer {CANARY} there", f"account_key: {CANARY}", f"{{'aws_secret_access_key': '{CANARY}', 'x': 1}}",
    f'connection_string="A=b c;K={CANARY}"', f'{{\\"sas_token\\": \\"{CANARY}\\"}}', f"SharedKey devstoreaccount1:{CANARY}=",
    f"AZURE_STORAGE_CONNECTION_STRING={CANARY}", f"password='a b {CANARY}'",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_forms_of_credentials_are_hidden_in_values_and_in_text(text: str) -> None:
    for shown in (scrub(text), scrubbed({"a": text})["a"], scrubbed([text])[0]):
        assert CANARY not in shown and "***" in shown and scrubbed(shown) == shown == scrub(shown)


@pytest.mark.parametrize("text", FORMS_OF_TEXT)
def test_forms_of_credentials_are_hidden_in_text(text: str) -> None:
    shown = scrub(text)
    assert CANARY not in shown and "***" in shown and scrub(shown) == shown


@pytest.mark.parametrize("text", [
    "step: 3, se_loss 0.5, mpp 0.25, slides at az://container/slide.svs", "SP: 0.5, SE: 0.7, sig=0.01, token: x, secret=y",
    "abfs://container@account.dfs.core.windows.net/a", "https://h/?next=https://a/sp=1?page=2#token-count",
    "http://host:80/a@b http://h?a@b", "http://127.0.0.1:8080/x?page=2#sp=1", "why? sp=0.5&se=1 (see a/b)",
    "monkey=3 keyed: x turkey=4 tokens=196 cls_token: 1 connection=2", "{'sp': 0.5, 'signature': [1, 2]}",
])  # fmt: skip
def test_other_text_is_left_alone(text: str) -> None:
    assert scrub(text) == text == scrubbed(text)


@pytest.mark.timeout(120)  # each takes a fraction of a second; what looks twice at its input would take hours
@pytest.mark.parametrize("piece", ["a", "sig=", "://", "aws", "http://u:p@h?", "://u:p", "&a_", "?#a_", 'password="', " ", "\\"])
def test_scrubbing_takes_linear_time(piece: str) -> None:
    text = piece * (250_000 // len(piece))
    for case in (text, f"?&{text}", f"http://{text}", f"account_key{text}"):
        scrub(case)
        scrubbed(case)


# Whatever prints.


@contextmanager
def scrubbed_streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    hide_options(OPTIONS)
    secrets.scrub_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def test_libraries_and_threads_print_no_credential(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError(f"in a thread {CANARY}")

    with scrubbed_streams():
        print("out", CANARY)
        handler = logging.StreamHandler()
        logging.getLogger("other").addHandler(handler)
        logging.getLogger("other").warning("of a library %s", CANARY)
        logging.getLogger("other").removeHandler(handler)
        hook, threading.excepthook = threading.excepthook, threading.__excepthook__
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        threading.excepthook = hook
        sys.__excepthook__(OSError, OSError(f"uncaught {CANARY}"), None)
    shown = "".join(capsys.readouterr())
    assert CANARY not in shown
    assert all(f"{words} ***" in shown for words in ("out", "of a library", "in a thread", "uncaught")), shown


def test_a_rank_raises_and_files_what_failed_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fail(*_: object) -> None:
        raise RuntimeError(f"of a library: https://h/x?sig={CANARY}")

    monkeypatch.setattr(run_module, "load", fail)
    with scrubbed_streams(), pytest.raises(RankFailed, match=r"^RuntimeError: of a library: https://h/x\?sig=\*\*\*") as failed:
        execute("index", ["manifest=x.csv", f"out={tmp_path / 'out'}"])
    assert failed.value.__cause__ is None and failed.value.__suppress_context__
    assert "Traceback" in str(failed.value) and CANARY not in str(failed.value)
    said = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "RankFailed: RuntimeError" in said["message"] and CANARY not in json.dumps(said)


@pytest.mark.parametrize("word", [
    f"storage.options.s3.secret={{{CANARY}", f"--storage.options.s3.secret={CANARY}", f"~storage.options.s3.secret={CANARY}",
    f"storage.options.s3.secret={CANARY},{CANARY}", f"storage.options={{s3: {{secret: {CANARY}, key: [}}",
    f"storage={{options: {{s3: {{secret: {CANARY}}}}}}}", f"storage.options.az.connection_string=${{{CANARY}}}",
    f"storge.options.az.connection_string={CANARY}", f"storage.options={CANARY}", f"storage.deadline_s=http://u:{CANARY}@h/",
])  # fmt: skip
def test_a_mistake_repeats_no_credential(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("index", ["manifest=x.csv", f"out={tmp_path / 'out'}", word]) == 2
    shown = "".join(capsys.readouterr())
    assert shown and CANARY not in shown


def test_trackers_are_told_no_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    told: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **values: told.update(values))
    config = JournalConfig("off", 10, "offline", "test", False)
    tracked(Journal(tmp_path, config), {"storage": {"options": OPTIONS}, "catalog": f"http://u:{CANARY}@h/x", "site": "SP"})
    assert CANARY not in str(told) and told["config"]["site"] == "SP"


def test_passwords_of_urls_are_known_by_themselves() -> None:
    hide({"catalog": f"http://someone:{CANARY}@host/a", "out": "abfs://containers@account.dfs.core.windows.net/x"})
    assert scrub(f"{CANARY} containers account") == "*** containers account"


def test_what_is_not_caught_shows_no_credential(tmp_path: Path) -> None:
    code = f"""
import sys
import warnings
from histoscale.data import secrets
from histoscale.launch import run
secrets.hide_options({{"s3": {{"secret": "{CANARY[:8]}" + "{CANARY[8:]}"}}}})
def fail(*_):
    warnings.warn("warned " + {CANARY[:8]!r} + {CANARY[8:]!r})
    try:
        raise KeyError("first " + {CANARY[:8]!r} + {CANARY[8:]!r})
    except KeyError as error:
        raise RuntimeError("then " + {CANARY[:8]!r} + {CANARY[8:]!r}) from error
run.invoke = fail
sys.exit(run.execute("index", []))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and CANARY not in done.stderr
    assert all(words in done.stderr for words in ("UserWarning: warned ***", "first ***", "RuntimeError: then ***"))
