"""Storage against real servers on loopback: ranges, patience, refusals, the cache; no secret in any message."""

import contextlib
import gc
import os
import pickle
import resource
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
from store_children import die_while_copying, fill_many

from histoscale.data.cache import FileCache
from histoscale.data.living import signature
from histoscale.data.storage import Changed, Fingerprint, Missing, StorageConfig, StorageError, Store, check_uri, resolve

DATA = bytes(range(256)) * 64


class RangeServer(ThreadingHTTPServer):
    """Serves DATA at any path by range; `fault(path, tries)` may name a status, "cut", "whole" or "hang" instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault: Callable[[str, int], int | str | None] = lambda path, tries: None
        self.tries: dict[str, int] = {}
        self.released = threading.Event()
        self.lock = threading.Lock()

    def uri(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: RangeServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        with self.server.lock:
            tries = self.server.tries[self.path] = self.server.tries.get(self.path, 0) + 1
        fault = self.server.fault(self.path, tries)
        if fault == "hang":
            self.server.released.wait(30)
            fault = 503
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        part = DATA
        if wanted and fault != "whole":
            first, last = wanted.removeprefix("bytes=").split("-")
            part = DATA[int(first) : int(last) + 1]
        self.send_response(206 if len(part) < len(DATA) else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"v1"')
        self.end_headers()
        if body and fault == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[RangeServer]:
    found = RangeServer()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.released.set()
    found.shutdown()
    found.server_close()


def test_local_ranges(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    for uri in (str(path), f"file://{path}"):
        assert store.ranges(uri, [(0, 3), (250, 260), (7, 7)]) == [DATA[:3], DATA[250:260], b""]
        assert store.read(uri) == DATA and store.exists(uri) and store.local(uri) == path
        assert store.fingerprint(uri) == Fingerprint(len(DATA), str(path.stat().st_mtime_ns))
    with pytest.raises(Changed, match="ends at byte 16384"):
        store.ranges(str(path), [(0, len(DATA) + 1)])
    with pytest.raises(Missing, match="none.bin"):
        store.ranges(str(tmp_path / "none.bin"), [(0, 1)])
    assert not store.exists(str(tmp_path / "none.bin"))
    with pytest.raises(StorageError, match="directory"):
        store.read(str(tmp_path))


def test_remote_ranges(server: RangeServer, store: Store) -> None:
    uri = server.uri("a.bin")
    assert store.ranges(uri, [(0, 3), (250, 260)]) == [DATA[:3], DATA[250:260]]
    assert store.read(uri) == DATA
    assert store.fingerprint(uri) == Fingerprint(len(DATA), "v1")
    assert store.local(uri).read_bytes() == DATA and store.retried == 0


def test_only_the_configuration_travels(server: RangeServer, store: Store) -> None:
    uri = server.uri("a.bin")
    store.read(uri)
    again = pickle.loads(pickle.dumps(store))
    assert again.config == store.config and again.ranges(uri, [(1, 2)]) == [DATA[1:2]]


def test_threads_share_a_store(server: RangeServer, store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: store.ranges(server.uri("a.bin"), [(i, i + 50), (i + 90, i + 99)]), range(40)))
    assert found == [[DATA[i : i + 50], DATA[i + 90 : i + 99]] for i in range(40)]


@pytest.mark.parametrize("fault", [500, 503, 429, "cut"])
def test_what_passes_is_repeated(server: RangeServer, store: Store, fault: int | str) -> None:
    server.fault = lambda path, tries: fault if tries <= 2 else None
    assert store.ranges(server.uri("a.bin"), [(10, 500)]) == [DATA[10:500]]
    assert store.retried == 2 and server.tries["/a.bin"] == 3


def test_only_the_spans_that_failed_are_asked_again(server: RangeServer, store: Store) -> None:
    server.fault = lambda path, tries: 503 if tries == 2 else None
    assert store.ranges(server.uri("a.bin"), [(i, i + 5) for i in range(6)]) == [DATA[i : i + 5] for i in range(6)]
    assert server.tries["/a.bin"] == 7


class Visit:
    """What its caller holds while it reads: megabytes of pixels."""


@pytest.mark.parametrize(
    ("backend", "fault"),
    [("fsspec", 503), ("fsspec", "cut"), ("fsspec", 404), ("fsspec", 401), ("obstore", 404), ("obstore", 401)],
)
def test_a_failed_request_keeps_nothing_of_its_caller(server: RangeServer, store: Store, backend: str, fault: int | str) -> None:
    """An error holds the frames that it came through, and they hold it: that is let go by the garbage collector alone, which in a
    process of millions of objects looks once in hours."""
    reading = Store(replace(store.config, backend=backend))

    def read() -> weakref.ref[Visit]:
        visit = Visit()
        server.tries.clear()
        server.fault = lambda path, tries: fault if tries <= 2 else None  # both spans, once
        with contextlib.suppress(StorageError):
            assert reading.ranges(server.uri("a.bin"), [(10, 500), (600, 900)]) == [DATA[10:500], DATA[600:900]]
        return weakref.ref(visit)

    read()  # clients open, and modules are imported
    gc.collect()
    gc.disable()
    try:
        assert read()() is None
    finally:
        gc.enable()


def test_a_stall_is_cut_and_repeated(server: RangeServer, store: Store) -> None:
    impatient = Store(replace(store.config, request_timeout_s=1.0))
    server.fault = lambda path, tries: "hang" if tries == 1 else None
    assert impatient.ranges(server.uri("a.bin"), [(0, 9)]) == [DATA[:9]]
    assert impatient.retried == 1


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (404, Missing, "no such file"),
        (401, StorageError, "refuses the credential in storage.options.http"),
        (403, StorageError, "refuses the credential"),
        (400, StorageError, "refuses the request"),
        (416, Changed, "shorter"),
    ],
)
def test_what_does_not_pass_is_said_at_once(
    server: RangeServer, store: Store, fault: int, kind: type[StorageError], message: str
) -> None:
    server.fault = lambda path, tries: fault
    with pytest.raises(kind, match=message):
        store.ranges(server.uri("a.bin"), [(0, 5)])
    assert server.tries["/a.bin"] == 1
    if fault != 416:
        with pytest.raises(kind, match=message):
            store.fingerprint(server.uri("b.bin"))


def test_patience_ends_with_an_error_that_names_file_and_cause(server: RangeServer, store: Store) -> None:
    server.fault = lambda path, tries: 503
    impatient = Store(replace(store.config, deadline_s=1.0))
    with pytest.raises(StorageError, match=r"a\.bin could not be read after [2-9] tries.*deadline_s=1.*503"):
        impatient.ranges(server.uri("a.bin"), [(0, 5)])
    assert server.tries["/a.bin"] > 1
    with pytest.raises(StorageError, match="could not be read") as caught:
        impatient.fingerprint(server.uri("b.bin"))
    assert not isinstance(caught.value, Missing)  # fsspec calls every failure of info "not found"
    unreachable = "http://127.0.0.1:9/a.bin"
    with pytest.raises(StorageError, match="could not be read") as caught:
        Store(replace(store.config, deadline_s=1.0)).fingerprint(unreachable)
    assert not isinstance(caught.value, Missing)


def test_a_server_without_ranges_and_a_file_that_shrank(server: RangeServer, store: Store) -> None:
    server.fault = lambda path, tries: "whole"
    with pytest.raises(StorageError, match="may not support ranges"):
        Store(replace(store.config, deadline_s=1.0)).ranges(server.uri("a.bin"), [(5, 9)])
    fsspec.filesystem("memory").pipe("/bucket/short.bin", DATA)
    with pytest.raises(Changed, match="has 16384 bytes, a range up to 20000"):
        Store(replace(store.config, deadline_s=5.0)).ranges("memory://bucket/short.bin", [(16000, 20000)])


def test_tokens_in_uris_are_refused_and_never_shown(store: Store) -> None:
    for uri in ("az://c/a.svs?sv=2024&sig=SECRET", "https://host/a.svs?X-Amz-Signature=SECRET"):
        with pytest.raises(ValueError, match="storage.options") as caught:
            check_uri(uri)
        assert "SECRET" not in str(caught.value)
    check_uri("/odd?name.svs")
    with pytest.raises(ValueError, match="unknown scheme"):
        check_uri("ftq://x/a")


def test_secrets_do_not_reach_messages(server: RangeServer, store: Store) -> None:
    secret = Store(replace(store.config, options={"http": {"client_kwargs": {"headers": {"Authorization": "Bearer SECRET"}}}}))
    server.fault = lambda path, tries: 403
    with pytest.raises(StorageError) as caught:
        secret.ranges(server.uri("a.bin"), [(0, 5)])
    assert "SECRET" not in str(caught.value)


def test_wrong_options_and_missing_clients_are_one_clear_error(store: Store) -> None:
    with pytest.raises(StorageError, match="storage.options.az"):
        Store(replace(store.config, options={"az": {}})).read("az://container/a.svs")
    with pytest.raises(StorageError, match="pip install"):
        store.read("dropbox://a/b.svs")


def test_uris_resolve_against_the_manifest(tmp_path: Path) -> None:
    assert resolve("az://c/sets/m.csv", "../slides/a.svs") == "az://c/slides/a.svs"
    assert resolve("az://c/m.csv", "s3://b/a.svs") == "s3://b/a.svs"
    assert resolve(str(tmp_path / "m.csv"), "x/a.svs") == str(tmp_path / "x/a.svs")
    assert resolve("az://c/m.csv", "/abs/a.svs") == "/abs/a.svs"


# The cache of whole files


def test_folders_and_their_kin_are_copied_together(store: Store) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("series/1.dcm", "series/2.dcm", "series/note.txt", "m/slide.mrxs", "m/slide/Data0.dat", "m/slide/Index.dat"):
        memory.pipe(f"/kin/{name}", name.encode())
    memory.pipe("/kin/m/other.svs", b"")

    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    assert files(store.local("memory://kin/series")) == {"1.dcm", "2.dcm", "note.txt"}
    assert files(store.local("memory://kin/series/2.dcm").parent) == {"1.dcm", "2.dcm"}
    assert files(store.local("memory://kin/m/slide.mrxs").parent) == {"slide.mrxs", "slide/Data0.dat", "slide/Index.dat"}


def test_the_cache_keeps_its_bound_and_drops_the_longest_unused(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "c", 250)
    fills: list[str] = []

    def fill(name: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            fills.append(name)
            (folder / "x").write_bytes(bytes(100))

        return write

    folders = {name: cache.folder(name, fill(name)) for name in "ab"}
    os.utime(folders["a"], (1, 1))
    os.utime(folders["b"], (2, 2))
    cache.folder("a", fill("a"))  # used: now b is the oldest
    cache.folder("c", fill("c"))
    assert fills == ["a", "b", "c"]
    assert folders["a"].exists() and not folders["b"].exists()
    assert sum(p.stat().st_size for p in (tmp_path / "c").rglob("x")) <= 250


def test_a_copy_that_was_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "c", 1000)

    def die(folder: Path) -> None:
        (folder / "x").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.folder("a", die)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_process_killed_while_copying_harms_no_other(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool, pytest.raises(BrokenProcessPool):
        pool.submit(die_while_copying, str(tmp_path), "a").result(60)
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.endswith(".partial") and (left[0] / "x").read_bytes() == b"half"
    cache = FileCache(tmp_path, 1 << 20)
    assert (cache.folder("a", lambda folder: (folder / "x").write_bytes(b"whole") and None) / "x").read_bytes() == b"whole"
    assert not left[0].exists(), "the next one who fills the cache removes it"


def test_a_copy_of_one_who_lives_stays_whatever_the_clock_says(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1 << 20)

    def slow(folder: Path) -> None:
        (folder / "x").write_bytes(b"ha")
        for path in (folder / "x", folder):
            os.utime(path, (1, 1))  # as if the clock had been set
        cache.folder("b", lambda other: (other / "x").write_bytes(b"") and None)
        (folder / "x").write_bytes(b"whole")

    assert (cache.folder("a", slow) / "x").read_bytes() == b"whole"


@pytest.mark.parametrize("whose", ["nobody's", "another host's", "another boot's"])
def test_a_copy_of_whom_nobody_can_tell_goes_once_nothing_was_written_to_it_for_an_hour(tmp_path: Path, whose: str) -> None:
    """Of a container that is gone, or of another machine of this one's name that is at work on the same disk."""
    host, boot = (signature()[i : i + 4] for i in (2, 6))
    other = "0000" if "0000" not in (host, boot) else "1111"
    signed = {
        "nobody's": "",
        "another host's": signature().replace(host, other, 1),
        "another boot's": f"hs{host}{other}{signature()[10:]}",
    }[whose]
    partial = tmp_path / f"{'0' * 32}.{signed}.{'1' * 32}.partial"
    partial.mkdir()
    (partial / "x").write_bytes(b"half")
    cache = FileCache(tmp_path, 1 << 20)

    def next_one(name: str, folder_s: float, file_s: float) -> bool:
        """Whether the copy is there after somebody filled the cache, `…_s` seconds after its last change."""
        for path, seconds in ((partial / "x", file_s), (partial, folder_s)):
            os.utime(path, (time.time() - seconds,) * 2)
        cache.folder(name, lambda folder: (folder / "x").write_bytes(b"whole") and None)
        return partial.exists()

    assert next_one("a", 0.0, 0.0) and next_one("b", 7200.0, 3000.0)
    assert not next_one("c", 7200.0, 7200.0)


def test_processes_that_crowd_a_small_cache_read_whole_entries(tmp_path: Path) -> None:
    """Room for 40 entries, three processes that want 90 of them: evicted and filled again all the time, never half."""
    with ProcessPoolExecutor(3, mp_context=get_context("forkserver")) as pool:
        wanted = [[(17 * i + 29 * p) % 90 for i in range(150)] for p in range(3)]
        found = [future.result(120) for future in [pool.submit(fill_many, str(tmp_path), 4000, numbers) for numbers in wanted]]
    assert all(all(whole) for whole in found)
    FileCache(tmp_path, 4000).folder("last", lambda folder: (folder / "x").write_bytes(bytes(100)) and None)
    assert sum(path.stat().st_size for path in tmp_path.rglob("x")) <= 4000


def test_a_full_cache_disk_is_named(store: Store) -> None:
    """No file may grow beyond the limit, as on a disk that is full: the same error from the same system calls."""
    fsspec.filesystem("memory").pipe("/full/a.ndpi", DATA)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            store.local("memory://full/a.ndpi")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value.filename).startswith(store.config.cache_dir) and caught.value.filename.endswith("/a.ndpi")


def test_many_fill_one_entry_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def fill(folder: Path) -> None:
        barrier.wait(10)
        (folder / "x").write_bytes(DATA)

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: FileCache(tmp_path, 1 << 20).folder("a", fill), range(4)))
    assert len(found) == 1 and (found.pop() / "x").read_bytes() == DATA
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_larger_than_the_cache_is_refused(store: Store) -> None:
    fsspec.filesystem("memory").pipe("/big/a.ndpi", DATA)
    small = Store(StorageConfig({}, "fsspec", store.config.cache_dir, 1000, 5.0, 5.0, 60.0))
    with pytest.raises(StorageError, match="storage.cache_bytes=1000"):
        small.local("memory://big/a.ndpi")
