"""Bytes from anywhere: ranges, sizes, fingerprints and whole local copies of files behind any fsspec URI."""

import contextlib
import hashlib
import os
import posixpath
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync

from histoscale.data.cache import FileCache
from histoscale.data.journal import scrub

Result = TypeVar("Result")

BLOCK = 16 << 20  # whole files are copied in ranges of so many bytes, each with its own retries
_LONGEST_PAUSE_S = 10.0
_CLIENTS = ("aiohttp", "azure", "botocore", "aiobotocore", "gcsfs", "google", "fsspec", "s3fs", "requests", "urllib3")
_TOKENS = {
    "az": "sas_token", "abfs": "sas_token", "abfss": "sas_token", "s3": "key and storage.options.s3.secret", "gs": "token",
    "gcs": "token", "http": "headers", "https": "headers",
}  # fmt: skip
_TAGS = ("ETag", "etag", "e_tag", "md5Hash", "Last-Modified", "last_modified", "LastModified", "updated", "created", "mtime")
_PACKAGES = {"s3": "histoscale[s3]", "gs": "histoscale[gcs]", "gcs": "histoscale[gcs]"}


class StorageError(OSError):
    """A file could not be read for a reason outside the file; the message names the file and the cause."""


class Missing(StorageError):
    """There is no such file."""


class Changed(StorageError):
    """The file is not the one that was catalogued, or is shorter than it was."""


@dataclass(frozen=True)
class StorageConfig:
    """options: fsspec options by scheme. cache_dir, cache_bytes: whole copies of remote files. deadline_s, retries: patience."""

    options: dict[str, Any]
    cache_dir: str
    cache_bytes: int
    deadline_s: float
    retries: int


@dataclass(frozen=True)
class Fingerprint:
    """size in bytes; tag: the store's etag, else the time of the last change."""

    size: int
    tag: str


def check_uri(uri: str) -> None:
    """Raises ValueError for a URI that carries a credential, or whose scheme nothing reads."""
    scheme = _scheme(uri)
    if not scheme:
        return
    if "?" in uri:
        raise ValueError(
            f"the URI {scrub(uri.split('?')[0])}?… has a query string, which is how tokens leak into files and logs: "
            f"drop it and set storage.options.{scheme}.{_TOKENS.get(scheme, 'token')} instead"
        )
    if scheme not in fsspec.available_protocols():
        raise ValueError(f"the URI {scrub(uri)} has the unknown scheme {scheme!r}: expected a path, az://, s3://, gs:// or http(s)://")


def resolve(base: str, uri: str) -> str:
    """The URI itself if it is absolute, else relative to the folder of `base`."""
    if _scheme(uri) or os.path.isabs(uri):
        return uri
    scheme = _scheme(base)
    if not scheme:
        return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(base)), uri))
    start, path = base.split("://", 1)
    return f"{start}://{posixpath.normpath(posixpath.join(posixpath.dirname(path), uri))}"


def join(folder: str, name: str) -> str:
    """The URI of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def _scheme(uri: str) -> str:
    scheme, found, _ = uri.partition("://")
    return scheme.lower() if found and scheme.lower() != "file" else ""


def _path(uri: str) -> Path:
    return Path(uri[7:] if uri[:7].lower() == "file://" else uri).expanduser()


class Store:
    """All file access. Only the configuration is pickled; clients (they do not survive a fork) open lazily, once a process."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        self.retried = 0  # requests repeated by this process
        self._clients: dict[str, Any] = {}
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Store"], tuple[StorageConfig]]:
        return Store, (self.config,)

    def ranges(self, uri: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of every span. Raises Missing, Changed (the file is shorter) or StorageError."""
        if not _scheme(uri):
            return self._local_ranges(uri, spans)
        found: list[bytes | None] = [None] * len(spans)

        def attempt(timeout_s: float) -> None:
            todo = [i for i, data in enumerate(found) if data is None]
            replies = self._fetch(uri, [spans[i] for i in todo], timeout_s)
            failure: BaseException | None = None
            for i, reply in zip(todo, replies, strict=True):
                if isinstance(reply, BaseException):
                    failure = reply
                elif len(reply) != spans[i][1] - spans[i][0]:
                    failure = _Short(f"{len(reply)} bytes came for the range {spans[i]}")
                else:
                    found[i] = reply
            if failure is not None:
                raise failure

        try:
            self._patiently(uri, attempt)
        except _Short as short:
            size = self.size(uri)
            if any(stop > size for _, stop in spans):
                raise Changed(f"{scrub(uri)} has {size} bytes, a range up to {max(s for _, s in spans)} was expected") from short
            raise StorageError(f"{scrub(uri)}: {short}; the server may not support ranges") from short
        return [data for data in found if data is not None]

    def size(self, uri: str) -> int:
        """Bytes of a file."""
        return self.fingerprint(uri).size

    def fingerprint(self, uri: str) -> Fingerprint:
        """What tells a changed file: of a folder, over all its files. Raises Missing or StorageError."""
        if self.is_folder(uri):
            parts = [(name, self.fingerprint(join(uri, name))) for name in self.children(uri)]
            tags = "\n".join(f"{name} {part.size} {part.tag}" for name, part in parts)
            return Fingerprint(sum(part.size for _, part in parts), hashlib.sha256(tags.encode()).hexdigest()[:16])
        if not _scheme(uri):
            with _local_errors(uri):
                stat = _path(uri).stat()
            return Fingerprint(stat.st_size, str(stat.st_mtime_ns))
        info = self._info(uri)
        if info.get("size") is None:
            raise StorageError(f"{scrub(uri)}: the server does not tell the size of the file, so it cannot be read by range")
        return Fingerprint(int(info["size"]), next((str(info[name]) for name in _TAGS if info.get(name)), ""))

    def read(self, uri: str) -> bytes:
        """The whole file."""
        if not _scheme(uri):
            with _local_errors(uri):
                return _path(uri).read_bytes()
        return b"".join(self._blocks(uri, self.size(uri)))

    def exists(self, uri: str) -> bool:
        """Whether there is such a file or folder."""
        try:
            return _path(uri).exists() if not _scheme(uri) else bool(self._info(uri))
        except Missing:
            return False

    def is_folder(self, uri: str) -> bool:
        """Whether the URI names a folder; a store without folders knows them by what lies below. Raises Missing."""
        if not _scheme(uri):
            return _path(uri).is_dir()
        return self._info(uri).get("type") == "directory"

    def children(self, uri: str) -> list[str]:
        """Names of the files directly in a folder, sorted; hidden files and subfolders are left out."""
        if not _scheme(uri):
            with _local_errors(uri):
                return sorted(p.name for p in _path(uri).iterdir() if p.is_file() and not p.name.startswith("."))
        entries = self._call(uri, "ls", detail=True, refresh=True)
        names = (posixpath.basename(e["name"].rstrip("/")) for e in entries if e.get("type") != "directory")
        return sorted(name for name in names if name and not name.startswith("."))

    def local(self, uri: str) -> Path:
        """The file or folder on a local disk. A remote one is copied whole into the cache, with the files that belong to it: the
        folder of an MRXS slide, the instances beside a DICOM file."""
        if not _scheme(uri):
            if not _path(uri).exists():
                raise Missing(f"{uri}: no such file")
            return _path(uri)
        mark = self.fingerprint(uri)
        cache = FileCache(Path(self.config.cache_dir).expanduser(), self.config.cache_bytes)
        name = posixpath.basename(uri.rstrip("/"))
        return cache.folder(f"{uri} {mark.size} {mark.tag}", lambda folder: self._copy(uri, folder)) / name

    def _copy(self, uri: str, folder: Path) -> None:
        name = posixpath.basename(uri.rstrip("/"))
        parent = uri.rstrip("/")[: -len(name) - 1]
        if self.is_folder(uri):
            wanted = [(join(uri, child), folder / name / child) for child in self.children(uri)]
        elif name.lower().endswith(".dcm"):
            siblings = [child for child in self.children(parent) if child.lower().endswith(".dcm")]
            wanted = [(join(parent, child), folder / child) for child in siblings]
        elif name.lower().endswith(".mrxs"):
            beside = uri[: -len(".mrxs")]
            wanted = [(uri, folder / name)]
            wanted += [(join(beside, child), folder / name[: -len(".mrxs")] / child) for child in self.children(beside)]
        else:
            wanted = [(uri, folder / name)]
        total = sum(self.size(source) for source, _ in wanted)
        if total > self.config.cache_bytes:
            limit = self.config.cache_bytes
            raise StorageError(f"{scrub(uri)} takes {total} bytes, more than storage.cache_bytes={limit}: raise it")
        for source, path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for block in self._blocks(source, self.size(source)):
                    file.write(block)

    def _blocks(self, uri: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, BLOCK):
            yield self.ranges(uri, [(start, min(start + BLOCK, size))])[0]

    def _local_ranges(self, uri: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        with _local_errors(uri):
            handle = os.open(_path(uri), os.O_RDONLY)
            try:
                found = [os.pread(handle, stop - start, start) for start, stop in spans]
            finally:
                os.close(handle)
        for data, (start, stop) in zip(found, spans, strict=True):
            if len(data) != stop - start:
                raise Changed(f"{uri} ends at byte {start + len(data)}, the range {start}-{stop} was expected")
        return found

    def _info(self, uri: str) -> dict[str, Any]:
        return self._call(uri, "info")

    def _call(self, uri: str, method: str, **options: Any) -> Any:
        """One call of the client with patience, never from its listing cache."""

        def attempt(timeout_s: float) -> Any:
            client = self._client(uri)
            client.invalidate_cache()
            path = client._strip_protocol(uri)
            if client.async_impl:
                return sync(client.loop, getattr(client, f"_{method}"), path, timeout=timeout_s, **options)
            return getattr(client, method)(path, **options)

        return self._patiently(uri, attempt)

    def _fetch(self, uri: str, spans: Sequence[tuple[int, int]], timeout_s: float) -> list[bytes | BaseException]:
        """One reply a span: bytes, or what went wrong with this span (the caller looks at each)."""
        client = self._client(uri)
        path = client._strip_protocol(uri)
        paths, starts, stops = [path] * len(spans), [a for a, _ in spans], [b for _, b in spans]
        if client.async_impl:
            return sync(client.loop, client._cat_ranges, paths, starts, stops, timeout=timeout_s, on_error="return")
        return client.cat_ranges(paths, starts, stops, on_error="return")

    def _client(self, uri: str) -> Any:
        with self._lock:
            if self._pid != os.getpid():
                self._clients, self._pid = {}, os.getpid()
            scheme = _scheme(uri)
            if scheme not in self._clients:
                options = self.config.options.get(scheme, {})
                try:
                    self._clients[scheme] = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
                except ImportError as error:
                    package = _PACKAGES.get(scheme, "the package it names")
                    raise StorageError(f"{scheme}:// needs a client: pip install {package} ({error})") from error
                except (ValueError, TypeError) as error:
                    raise StorageError(f"{scheme}:// does not open with storage.options.{scheme}: {scrub(str(error))}") from error
            return self._clients[scheme]

    def _patiently(self, uri: str, attempt: Callable[[float], Result]) -> Result:
        """Repeat what may pass by itself, with growing jittered pauses, until `retries` or `deadline_s` are spent."""
        start, tries = time.monotonic(), self.config.retries + 1
        for count in range(tries):
            left = self.config.deadline_s - (time.monotonic() - start)
            try:
                return attempt(max(left / (tries - count), 0.05))  # a request that stalls leaves time for the next
            except StorageError:
                raise
            except Exception as error:
                pause = min(0.2 * 2**count, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                final = _final(uri, error, self.config)
                if final is not None:
                    raise final from error
                if count + 1 == tries or left <= pause:
                    if isinstance(error, _Short):
                        raise
                    spent = f"after {count + 1} tries in {time.monotonic() - start:.0f} s"
                    raise StorageError(f"{scrub(uri)} could not be read {spent}: {_told(error)}") from error
                self.retried += 1
                time.sleep(pause)
        raise AssertionError("unreachable: the last try returns or raises")


class _Short(Exception):
    """Fewer bytes than asked for: a cut connection, or a file that became shorter."""


@contextlib.contextmanager
def _local_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(f"{uri}: no such file") from error
    except OSError as error:
        raise StorageError(f"{uri}: {error.strerror or error}") from error


def _told(error: BaseException) -> str:
    text = scrub(" ".join(str(error).split()))
    return f"{type(error).__name__}{': ' + text[:300] if text else ''}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status in an exception of any client."""
    for cause in _causes(error):
        if type(cause).__module__ == "aiohttp.http_exceptions":
            continue  # a body that was cut calls itself 400
        reply = getattr(cause, "response", None)
        meta = reply.get("ResponseMetadata", {}) if isinstance(reply, dict) else {}
        for value in (getattr(cause, "status", None), getattr(cause, "status_code", None), getattr(cause, "code", None),
                      meta.get("HTTPStatusCode")):  # fmt: skip
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def _cut_off(error: BaseException) -> bool:
    """Whether a "not found" is a connection that failed: fsspec's http client says so of every failure of `info`."""
    causes = list(_causes(error))[1:]
    return any(isinstance(c, TimeoutError | ConnectionError) or type(c).__module__.startswith("aiohttp") for c in causes)


def _final(uri: str, error: Exception, config: StorageConfig) -> Exception | None:
    """What to raise at once, or None for what may pass by itself."""
    scheme, status = _scheme(uri), _status(error)
    names = {type(cause).__name__ for cause in _causes(error)}
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and status is None and not _cut_off(error)):
        return Missing(f"{scrub(uri)}: no such file")
    refused = {"ClientAuthenticationError", "NoCredentialsError", "PartialCredentialsError", "CredentialUnavailableError"}
    if isinstance(error, PermissionError) or status in (401, 403) or names & refused:
        return StorageError(f"{scrub(uri)}: the store refuses the credential in storage.options.{scheme} ({_told(error)})")
    if status == 416:
        return None if isinstance(error, _Short) else Changed(f"{scrub(uri)} is shorter than it was: {_told(error)}")
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return StorageError(f"{scrub(uri)}: the store refuses the request ({_told(error)})")
    known = isinstance(error, OSError | TimeoutError | EOFError | _Short) or status is not None
    if known or type(error).__module__.split(".")[0] in _CLIENTS:
        return None
    return error
