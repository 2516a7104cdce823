"""Every kind of store through every back end, on real servers: the same bytes, the same fingerprints, the same errors."""

import base64
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback_fixtures import upload
from store_children import copy_whole, read_ranges

from histoscale.data.clients.azure import shared_key
from histoscale.data.clients.translate import translated
from histoscale.data.storage import Changed, Missing, StorageError, Store
from histoscale.launch.loopback import ACCOUNT, ACCOUNT_KEY, Proxy, Server, connection_string

DATA = np.random.default_rng(0).bytes(300_000)
FILES = {"sub/a slide.bin": DATA, "sub/short.bin": DATA[:1000], "sub/below/b.bin": b"x", "top.bin": b"y"}
BACKENDS = ("fsspec", "obstore")
pytest.importorskip("obstore")


@dataclass(frozen=True)
class Place:
    """Where FILES stand: root, storage options, and whether folders can be listed."""

    root: str
    options: dict[str, Any]
    lists: bool


@pytest.fixture(scope="session", params=["az", "abfs", "s3", "gs", "http"])
def place(request: pytest.FixtureRequest) -> Place:
    scheme = request.param
    if scheme in ("az", "abfs"):
        connection = connection_string(request.getfixturevalue("azure_server").url)
        root = upload(connection, FILES, "files")
        return Place(root.replace("az:", f"{scheme}:"), {scheme: {"connection_string": connection}}, True)
    if scheme == "s3":
        import boto3

        url = request.getfixturevalue("aws_server").url
        options = {"key": "AKIA-of-a-test", "secret": "a-secret-of-a-test", "endpoint_url": url}
        client = boto3.client("s3", endpoint_url=url, aws_access_key_id=options["key"], aws_secret_access_key=options["secret"],
                              region_name="us-east-1")  # fmt: skip
        client.create_bucket(Bucket="files")
        for name, data in FILES.items():
            client.put_object(Bucket="files", Key=name, Body=data)
        return Place("s3://files", {"s3": options}, True)
    server, folder = request.getfixturevalue("folder_server")
    for name, data in FILES.items():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_bytes(data)
    if scheme == "gs":
        return Place("gs://files", {"gs": {"token": "anon", "endpoint_url": server.url}}, True)
    return Place(f"{server.url}/files", {}, False)


def opened(store: Store, place: Place, backend: str, **more: Any) -> Store:
    return Store(replace(store.config, options=place.options, backend=backend, **more))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bytes_and_errors_from_every_store(place: Place, backend: str, store: Store) -> None:
    remote = opened(store, place, backend)
    name = "sub/a%20slide.bin" if place.root.startswith("http") else "sub/a slide.bin"
    uri = f"{place.root}/{name}"
    spans = [(0, 5), (7, 7), (100, 70_000), (70_000, 70_010), (299_999, 300_000)]
    assert remote.ranges(uri, spans) == [DATA[a:b] for a, b in spans]
    assert (remote.bytes, remote.retried) == (sum(b - a for a, b in spans), 0) and remote.requests == 4
    assert remote.read(uri) == DATA and remote.size(uri) == len(DATA) and remote.exists(uri) and not remote.is_folder(uri)
    assert remote.local(uri).read_bytes() == DATA
    with pytest.raises(Missing, match="no such file"):
        remote.ranges(f"{place.root}/sub/none.bin", [(0, 4), (8, 9)])
    with pytest.raises(Missing):
        remote.fingerprint(f"{place.root}/sub/none.bin")
    assert not remote.exists(f"{place.root}/sub/none.bin")
    for beyond in ([(0, 4), (999, 1001)], [(5000, 5001)]):
        with pytest.raises(Changed):
            remote.ranges(f"{place.root}/sub/short.bin", beyond)
    if place.lists:
        assert remote.is_folder(f"{place.root}/sub") and remote.children(f"{place.root}/sub") == ["a slide.bin", "short.bin"]
        assert remote.fingerprint(f"{place.root}/sub").size == 301_000


def test_back_ends_agree_on_fingerprints(place: Place, store: Store) -> None:
    """A catalog made through one is not stale for the other."""
    found = [opened(store, place, backend).fingerprint(f"{place.root}/sub/short.bin") for backend in BACKENDS]
    assert found[0] == found[1] and found[0].tag


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_of_many_threads_are_in_flight_together(azure_server: Server, calm: Proxy, backend: str, store: Store) -> None:
    uri = upload(connection_string(azure_server.url), FILES, "files") + "/sub/a slide.bin"
    remote = Store(replace(store.config, backend=backend, options={"az": {"connection_string": connection_string(calm.url)}}))
    calm.set(delay_s=0.3)
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda i: remote.ranges(uri, [(j * 1000 + i, j * 1000 + i + 9) for j in range(5)]), range(64)))
    assert found == [[DATA[j * 1000 + i : j * 1000 + i + 9] for j in range(5)] for i in range(64)]
    assert calm.counts()["most_at_once"] > 120, "32 threads with 5 spans each: a pool of 100 would show"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_store_survives_forkserver(place: Place, backend: str, store: Store) -> None:
    remote, uri = opened(store, place, backend), f"{place.root}/top.bin"
    assert remote.ranges(uri, [(0, 1)]) == [b"y"]
    with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
        found = [future.result(60) for future in [pool.submit(read_ranges, remote, uri, [(0, 1)]) for _ in range(4)]]
    assert all(data == [b"y"] and pid != os.getpid() for pid, data in found)
    assert remote.ranges(uri, [(0, 1)]) == [b"y"]


def test_two_processes_copy_one_file(azure_server: Server, store: Store) -> None:
    connection = connection_string(azure_server.url)
    uri = upload(connection, FILES, "files") + "/sub/a slide.bin"
    remote = Store(replace(store.config, options={"az": {"connection_string": connection}}))
    with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as pool:
        found = [future.result(60) for future in [pool.submit(copy_whole, remote, uri) for _ in range(6)]]
    assert {data for _, data in found} == {DATA} and len({path for path, _ in found}) == 1
    assert len(list(Path(store.config.cache_dir).iterdir())) == 1


# Credentials


def test_signatures_are_those_of_the_sdk() -> None:
    from azure.core.pipeline import PipelineContext, PipelineRequest
    from azure.core.rest import HttpRequest
    from azure.storage.blob._shared.authentication import SharedKeyCredentialPolicy

    key = base64.b64encode(b"a key of a test, thirty-two bytes").decode()
    headers = {"x-ms-date": "Mon, 01 Jan 2024 00:00:00 GMT", "x-ms-range": "bytes=5-9", "x-ms-version": "2021-12-02"}
    for path in ("/container/a.svs", "/container/folder/a%20slide%2B.svs"):
        request = HttpRequest("GET", f"https://account.blob.core.windows.net{path}", headers=headers)
        context: Any = PipelineContext(None)
        SharedKeyCredentialPolicy("account", key).on_request(PipelineRequest(request, context))
        assert shared_key("account", key, path, headers) == request.headers["Authorization"]


def sas(minutes: int) -> str:
    from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas

    now = datetime.datetime.now(datetime.UTC)
    return generate_account_sas(
        ACCOUNT, ACCOUNT_KEY, ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions(read=True, list=True), now + datetime.timedelta(minutes=minutes), now - datetime.timedelta(days=1),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_sas_tokens_from_options_and_environment(
    azure_server: Server, backend: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(connection_string(azure_server.url), FILES, "files") + "/sub/a slide.bin"
    string = f"BlobEndpoint={azure_server.url};AccountName={ACCOUNT};SharedAccessSignature={sas(30)}"
    given = Store(replace(store.config, backend=backend, options={"az": {"connection_string": string}}))
    assert given.ranges(uri, [(3, 9)]) == [DATA[3:9]] and given.size(uri) == len(DATA)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", string)
    assert Store(replace(store.config, backend=backend)).ranges(uri, [(3, 9)]) == [DATA[3:9]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["expired", "wrong key"])
def test_a_refused_credential_is_one_clear_error(
    azure_server: Server, calm: Proxy, backend: str, kind: str, store: Store
) -> None:
    uri = upload(connection_string(azure_server.url), FILES, "files") + "/sub/a slide.bin"
    wrong = base64.b64encode(b"not the key of this account").decode()
    token = sas(-60)
    string = connection_string(calm.url, wrong) if kind == "wrong key" else (
        f"BlobEndpoint={calm.url};AccountName={ACCOUNT};SharedAccessSignature={token}"
    )  # fmt: skip
    remote = Store(replace(store.config, backend=backend, options={"az": {"connection_string": string}}))
    before = calm.counts()["requests"]
    for ask in (lambda: remote.ranges(uri, [(0, 5), (9, 12), (20, 22)]), lambda: remote.fingerprint(uri)):
        with pytest.raises(StorageError, match=r"a slide\.bin: the store refuses the credential in storage.options.az") as caught:
            ask()
        text = "".join(map(str, (caught.value, caught.value.__cause__)))
        assert wrong not in text and token not in text and token.rsplit("sig=", 1)[1][:20] not in text
    assert calm.counts()["requests"] - before <= 4 and remote.retried == 0


def test_options_that_obstore_cannot_take_are_named(store: Store) -> None:
    for scheme, options, name in (
        ("az", {"account_name": "a", "location_mode": "secondary"}, "storage.options.az.location_mode"),
        ("s3", {"profile": "lab"}, "storage.options.s3.profile"),
        ("gs", {"token": "anon", "consistency": "md5"}, "storage.options.gs.consistency"),
        ("http", {"client_kwargs": {"trust_env": True}}, "storage.options.http.client_kwargs.trust_env"),
    ):
        with pytest.raises(StorageError, match=name):
            Store(replace(store.config, backend="obstore", options={scheme: options})).read(f"{scheme}://host/a.svs")
    with pytest.raises(ValueError, match="storage.backend is 'boto'"):
        Store(replace(store.config, backend="boto"))


def test_options_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    string = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a2V5PT0=;EndpointSuffix=core.windows.net"
    assert translated("az", {"connection_string": string})[0] == {
        "account_name": "acc", "account_key": "a2V5PT0=", "endpoint": "https://acc.blob.core.windows.net"
    }  # fmt: skip
    assert translated("s3", {"key": "k", "secret": "s", "token": "t", "client_kwargs": {"region_name": "eu-west-1"}})[0] == {
        "access_key_id": "k", "secret_access_key": "s", "session_token": "t", "region": "eu-west-1"
    }  # fmt: skip
    assert translated("gs", {"token": "/keys/a.json", "project": "p"})[0] == {"application_credentials": "/keys/a.json"}
    headers = {"Authorization": "Bearer t"}
    assert translated("https", {"client_kwargs": {"headers": headers}}) == ({}, {"default_headers": headers})
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=1&sig=2")
    assert translated("abfs", {"account_name": "acc"})[0] == {"account_name": "acc", "sas_key": "sv=1&sig=2"}


# Faults


@pytest.fixture
def faulty(azure_server: Server, calm: Proxy, store: Store) -> Callable[..., tuple[Store, str]]:
    """A store behind the proxy, and a file of it."""

    def make(backend: str, **more: Any) -> tuple[Store, str]:
        uri = upload(connection_string(azure_server.url), FILES, "files") + "/sub/a slide.bin"
        options = {"az": {"connection_string": connection_string(calm.url)}}
        return Store(replace(store.config, backend=backend, options=options, **more)), uri

    return make


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["throttle", "cut", "stall"])
def test_failing_requests_change_nothing(faulty: Callable[..., tuple[Store, str]], calm: Proxy, backend: str, fault: str) -> None:
    remote, uri = faulty(backend, deadline_s=60.0, request_timeout_s=0.7)
    calm.set(seed=1, **{fault: 0.1})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: remote.ranges(uri, [(j * 5000 + i, j * 5000 + i + 2000) for j in range(4)]), range(25)))
    assert found == [[DATA[j * 5000 + i : j * 5000 + i + 2000] for j in range(4)] for i in range(25)]
    assert remote.retried > 0 and calm.counts()[fault] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outage_is_waited_for(faulty: Callable[..., tuple[Store, str]], calm: Proxy, backend: str) -> None:
    remote, uri = faulty(backend, deadline_s=60.0, request_timeout_s=5.0)
    assert remote.ranges(uri, [(0, 9)]) == [DATA[:9]]
    calm.set(out=True)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(remote.ranges, uri, [(5, 50)]), pool.submit(remote.size, uri)]
        while remote.retried < 4:
            time.sleep(0.05)
        assert not any(future.done() for future in waiting)
        calm.set()
        assert waiting[0].result(60) == [DATA[5:50]] and waiting[1].result(60) == len(DATA)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outage_that_lasts_is_an_error_not_a_missing_file(
    faulty: Callable[..., tuple[Store, str]], calm: Proxy, backend: str
) -> None:
    remote, uri = faulty(backend, deadline_s=1.5, request_timeout_s=0.5)
    for faults in ({"out": True}, {"stall": 1.0}, {"throttle": 1.0}):
        calm.set(**faults)
        with pytest.raises(StorageError, match=r"could not be read after [2-9] tries.*storage\.deadline_s=1\.5") as caught:
            remote.ranges(uri, [(0, 5)])
        assert not isinstance(caught.value, Missing | Changed)


def test_the_pause_that_a_store_asks_for_is_kept(faulty: Callable[..., tuple[Store, str]], calm: Proxy) -> None:
    """Longer than the deadline: then one try is enough to say so. (obstore does not show this header.)"""
    remote, uri = faulty("fsspec", deadline_s=20.0)
    before = calm.counts()["requests"]
    for status in (429, 503):
        calm.set(throttle=1.0, status=status, retry_after_s=60)
        with pytest.raises(StorageError, match=f"after 1 tries.*{status}.*the store asks to wait 60 s"):
            remote.ranges(uri, [(0, 5)])
    assert calm.counts()["requests"] - before == 2


# The servers themselves


def test_servers_end_with_the_process_that_started_them(azure_server: Server) -> None:
    """Killed, not asked."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from histoscale.launch.loopback import azurite, proxy, range_server\n"
        "servers = [azurite(None), range_server(Path('.'))]\n"
        "servers.append(proxy(servers[0]))\n"
        "print(*(one.process.pid for one in servers), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 30
    while any(_runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
