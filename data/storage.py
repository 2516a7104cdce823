"""Bytes from anywhere: ranges, sizes, fingerprints and whole local copies of files behind any URI."""

import contextlib
import errno
import hashlib
import logging
import os
import posixpath
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from histoscale.data.cache import FileCache
from histoscale.data.clients import Client, Info
from histoscale.data.clients.faults import Changed, Missing, Short, StorageError, final, retry_after_s, told, unframed
from histoscale.data.journal import names_file
from histoscale.data.secrets import hide_options, scrub

Result = TypeVar("Result")

BLOCK = 16 << 20  # whole files are copied in ranges of so many bytes, each with its own repeats
_NEVER_THERE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # of a path: the slide's own fault, none of the disk
_SHOWN = 300  # characters of such a path
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_TELL_S = 30.0  # a store that does not answer is told so often
_AZURE, _GOOGLE, _HTTP = ("az", "abfs", "abfss"), ("gs", "gcs"), ("http", "https")
_OBSTORE = (*_AZURE, *_GOOGLE, *_HTTP, "s3")
_TOKENS = {
    **dict.fromkeys(_AZURE, "sas_token"), **dict.fromkeys(_HTTP, "client_kwargs.headers"),
    "s3": "key and storage.options.s3.secret", "gs": "token", "gcs": "token",
}  # fmt: skip
_PACKAGES = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}
_CONTAINER = re.compile(r"[\w$.-]+@[\w.-]+(:\d+)?")  # of Azure, with its account
_ACCESS_POINT = re.compile(r"arn:[\w-]+:s3[\w-]*:[\w-]*:\d*:[\w.:-]+")  # of S3, by its name in place of a bucket's
_LINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")  # the scheme of a link that has no ://
_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[^:]*)(:\d*)?")  # a host and a port
_CREDENTIAL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/+[^/:@]*:[^/@]*@")  # user:password@ behind any number of slashes
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")
_log = logging.getLogger("histoscale.storage")


@dataclass(frozen=True)
class StorageConfig:
    """Where bytes come from, and patience.

    options: by scheme, with the names of fsspec's filesystems. backend: `fsspec`, or `obstore` for az, abfs, s3, gs and http.
    cache_dir, cache_bytes: whole copies of remote files. deadline_s: how long what may pass by itself is repeated.
    request_timeout_s: when one request is given up and repeated. decode_s: when decoding a visit or a region is given up.
    """

    options: dict[str, Any]
    backend: str
    cache_dir: str
    cache_bytes: int
    deadline_s: float
    request_timeout_s: float
    decode_s: float


@dataclass(frozen=True)
class Fingerprint:
    """size in bytes; tag: the store's etag, else the time of the last change."""

    size: int
    tag: str


def check_secret(uri: str) -> None:
    """Raises ValueError for a URI that carries a credential; the text has nothing of it."""
    scheme = uri.split(":/", 1)[0].lower()
    if _CREDENTIAL.match(uri) or any(map(_names_someone, _authorities(uri))):
        raise ValueError(
            f"the URI {scheme}://*** names a user or a password, which is how they leak into files and logs: drop them and set "
            f"storage.options.{scheme} instead"
        )
    if _scheme(uri) and "?" in uri:
        raise ValueError(
            f"the URI {scrub(uri.split('?')[0])}?… has a query string, which is how tokens leak into files and logs: "
            f"drop it and set storage.options.{scheme}.{_TOKENS.get(scheme, 'token')} instead"
        )


def check_uri(uri: str) -> None:
    """Raises ValueError for a URI that carries a credential, or whose scheme nothing reads."""
    check_secret(uri)
    if _ONE_SLASH.match(uri):
        raise ValueError(f"the URI {scrub(uri)} has one slash behind its scheme: expected ://, or a path")
    scheme = _scheme(uri)
    if not scheme:
        return
    import fsspec  # nothing on a disk needs it

    if scheme not in fsspec.available_protocols():
        raise ValueError(
            f"the URI {scrub(uri)} has the unknown scheme {scheme!r}: expected a path, az://, s3://, gs:// or http(s)://"
        )


def names_user(text: str) -> bool:
    """Whether a text, of a label say, holds a URI with a user or a password."""
    return any(_names_someone(place) for word in text.split() if "@" in word for place in _authorities(word))


def _authorities(uri: str) -> Iterator[tuple[str, str]]:
    """(scheme, what stands between :// and the next slash or link), of every URI in a chain such as zip://a::https://host."""
    parts = uri.split("://")
    for number, (before, behind) in enumerate(zip(parts, parts[1:], strict=False)):
        links = behind.split("::")  # but those of an IPv6 address
        while number < len(parts) - 2 and len(links) > 1 and _LINK.fullmatch(links[-1]):
            links.pop()
        authority = re.split(r"[/\\?#]", "::".join(links), maxsplit=1)[0]
        yield re.split(r"[^a-z0-9+.-]", before.lower())[-1], authority


def _names_someone(place: tuple[str, str]) -> bool:
    """Whether an authority holds more than a host and its port: user@, user:password@, or the beginning of a password that a
    slash cuts. az://container@account names nobody, nor does an access point of S3."""
    scheme, text = place
    if (scheme in _AZURE and _CONTAINER.fullmatch(text)) or (scheme == "s3" and _ACCESS_POINT.fullmatch(text)):
        return False
    return "@" in text or _PORT.fullmatch(text) is None


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


def _named(index: bytes) -> list[str]:
    """The files beside it that a Hamamatsu VMS or VMU file names; a name that leads elsewhere is none of them."""
    names = re.findall(rb"^(?:ImageFile|MapFile|OptimisationFile|MacroImage)[^=\n]*=([^\r\n]+)", index, re.MULTILINE)
    found = [name.decode("utf-8", "replace").strip() for name in names]
    return [name for name in dict.fromkeys(found) if name and not name.startswith(".") and not set(name) & set("/\\")]


def _scheme(uri: str) -> str:
    scheme, found, _ = uri.partition("://")
    return scheme.lower() if found and scheme.lower() != "file" else ""


def is_remote(uri: str) -> bool:
    """Whether the URI names a file in a store, not on a disk."""
    return bool(_scheme(uri))


def _path(uri: str) -> Path:
    return Path(uri[7:] if uri[:7].lower() == "file://" else uri).expanduser()


class Store:
    """All file access, from any thread. Only the configuration is pickled; clients (they do not survive a fork) open lazily,
    once a process. requests, bytes, retried: what this process asked of remote stores, got from them, and asked again."""

    def __init__(self, config: StorageConfig) -> None:
        if config.backend not in ("fsspec", "obstore"):
            raise ValueError(f"storage.backend is {config.backend!r}: expected fsspec or obstore")
        hide_options(config.options)
        self.config = config
        self.requests = self.bytes = self.retried = 0
        self._clients: dict[tuple[str, str], Client] = {}
        self._pid = os.getpid()
        self._told = -_TELL_S
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Store"], tuple[StorageConfig]]:
        return Store, (self.config,)

    def ranges(self, uri: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of every span. Raises Missing, Changed (the file is shorter) or StorageError."""
        if not _scheme(uri):
            return self._local_ranges(uri, spans)
        found: list[bytes | None] = [None if stop > start else b"" for start, stop in spans]
        tries = shorts = 0

        def attempt(timeout_s: float) -> None:
            nonlocal tries, shorts
            todo = [i for i, data in enumerate(found) if data is None]
            replies = self._client(uri).ranges(uri, [spans[i] for i in todo], timeout_s, tries > 0) if todo else []
            tries += 1
            failures: list[BaseException] = []
            for i, reply in zip(todo, replies, strict=True):
                if isinstance(reply, BaseException):
                    failures.append(unframed(reply))
                elif len(reply) != spans[i][1] - spans[i][0]:
                    failures.append(Short(f"{len(reply)} bytes came for the range {spans[i]}"))
                else:
                    found[i] = reply
            stop = next((failure for failure in failures if final(uri, "", failure) is not None), None)
            again = max(0, len(failures) - 1) if stop is None else 0  # _patiently counts one
            self._count(len(todo), sum(len(reply) for reply in replies if isinstance(reply, bytes)), again)
            short = next((failure for failure in failures if isinstance(failure, Short)), None)
            shorts += short is not None
            if shorts > 1 and short is not None:  # cut twice: is the file shorter than it was?
                self._check_length(uri, spans, timeout_s)
            if failures:
                raise stop or max(failures, key=retry_after_s)

        self._patiently(uri, attempt)
        return [data for data in found if data is not None]

    def _check_length(self, uri: str, spans: Sequence[tuple[int, int]], timeout_s: float) -> None:
        size, last = self._client(uri).info(uri, timeout_s).size, max(stop for _, stop in spans)
        self._count(1, 0, 0)
        if size is not None and last > size:
            raise Changed(f"{scrub(uri)} has {size} bytes, a range up to {last} was expected")

    def _count(self, requests: int, received: int, failed: int) -> None:
        with self._lock:
            self.requests += requests
            self.bytes += received
            self.retried += failed

    def size(self, uri: str) -> int:
        """Bytes of a file."""
        return self.fingerprint(uri).size

    def fingerprint(self, uri: str) -> Fingerprint:
        """What tells a changed file: of a folder, over all its files. Raises Missing or StorageError."""
        if not _scheme(uri):
            with _local_errors(uri):
                stat = _path(uri).stat()
            if not _path(uri).is_dir():
                return Fingerprint(stat.st_size, str(stat.st_mtime_ns))
        else:
            info = self._info(uri)
            if not info.folder and info.size is None:
                raise StorageError(f"{scrub(uri)}: the server does not tell the size of the file, so it cannot be read by range")
            if not info.folder and info.size is not None:
                return Fingerprint(info.size, info.tag)
        parts = [(name, self.fingerprint(join(uri, name))) for name in self.children(uri)]
        tags = "\n".join(f"{name} {part.size} {part.tag}" for name, part in parts)
        return Fingerprint(sum(part.size for _, part in parts), hashlib.sha256(tags.encode()).hexdigest()[:16])

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
        return self._info(uri).folder

    def children(self, uri: str) -> list[str]:
        """Names of the files directly in a folder, sorted; hidden files and subfolders are left out."""
        if not _scheme(uri):
            with _local_errors(uri):
                return sorted(p.name for p in _path(uri).iterdir() if p.is_file() and not p.name.startswith("."))

        def attempt(timeout_s: float) -> list[str]:
            self._count(1, 0, 0)
            return self._client(uri).children(uri, timeout_s)

        return sorted(name for name in self._patiently(uri, attempt) if name and not name.startswith("."))

    def local(self, uri: str) -> Path:
        """The file or folder on a local disk. A remote one is copied whole into the cache, with the files that belong to it: the
        folder of an MRXS slide, the instances beside a DICOM file, the files that a VMS file names."""
        if not _scheme(uri):
            if not _path(uri).exists():
                raise Missing(f"{uri}: no such file")
            return _path(uri)
        mark = self.fingerprint(uri)
        cache = FileCache(Path(self.config.cache_dir).expanduser(), self.config.cache_bytes)
        name = posixpath.basename(uri.rstrip("/"))
        return cache.folder(f"{uri} {mark.size} {mark.tag}", lambda folder: self._copy(uri, folder)) / name

    def parts(self, uri: str) -> list[str]:
        """The files that belong to a slide which is a file, and that file: those in the folder of an MRXS slide, the instances
        beside a DICOM file, the files that a VMS or VMU file names. Raises Missing, StorageError."""
        name = posixpath.basename(uri)
        parent = uri[: -len(name)]  # with its slash, "" for this folder
        kind = posixpath.splitext(name)[1].lower()
        if kind == ".dcm":
            return [parent + child for child in self.children(parent) if child.lower().endswith(".dcm")]
        if kind == ".mrxs":
            beside = uri[: -len(".mrxs")]
            return [uri, *(join(beside, child) for child in self.children(beside))]
        if kind in (".vms", ".vmu"):  # some are optional: OpenSlide knows which
            return [uri, *(parent + child for child in _named(self.read(uri)) if self.exists(parent + child))]
        return [uri]

    def _copy(self, uri: str, folder: Path) -> None:
        parent = uri.rstrip("/")[: -len(posixpath.basename(uri.rstrip("/")))]
        parts = [join(uri, child) for child in self.children(uri)] if self.is_folder(uri) else self.parts(uri)
        wanted = [(part, folder / part[len(parent) :]) for part in parts]
        total = sum(self.size(source) for source, _ in wanted)
        if total > self.config.cache_bytes:
            limit = self.config.cache_bytes
            raise StorageError(f"{scrub(uri)} takes {total} bytes, more than storage.cache_bytes={limit}: raise it")
        for source, path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            with names_file(path), path.open("wb") as file:
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

    def _info(self, uri: str) -> Info:
        def attempt(timeout_s: float) -> Info:
            self._count(1, 0, 0)
            return self._client(uri).info(uri, timeout_s)

        return self._patiently(uri, attempt)

    def _client(self, uri: str) -> Client:
        scheme = _scheme(uri)
        account = uri.split("://", 1)[1].split("/", 1)[0].partition("@")[2] if scheme in _AZURE else ""
        with self._lock:
            if self._pid != os.getpid():
                self._clients, self._pid = {}, os.getpid()
            if (scheme, account) not in self._clients:
                self._clients[scheme, account] = self._open(scheme, account)
            return self._clients[scheme, account]

    def _open(self, scheme: str, account: str) -> Client:
        options = dict(self.config.options.get(scheme, {}))
        try:
            if self.config.backend == "obstore" and scheme in _OBSTORE:
                from histoscale.data.clients.objects import Objects  # an extra, and its threads do not survive a fork

                return Objects(scheme, options, min(self.config.request_timeout_s, self.config.deadline_s))
            from histoscale.data.clients.azure import Azure  # half a second of imports that local slides do not need
            from histoscale.data.clients.filesystem import S3, Filesystem, Google, Http

            if scheme in _AZURE:
                return Azure(scheme, {"account_name": account.split(".")[0], **options} if account else options)
            if scheme in _HTTP:
                return Http(scheme, options)
            if scheme in _GOOGLE:
                return Google(options)
            return S3(options) if scheme == "s3" else Filesystem(scheme, options)
        except ImportError as error:
            package = "obstore" if self.config.backend == "obstore" else _PACKAGES.get(scheme, "")
            package = f"histoscale[{package}]" if package else "the package it names"
            raise StorageError(f"{scheme}:// needs a client: pip install {package} ({error})") from None
        except Exception as error:  # whatever a client makes of its options
            raise StorageError(f"{scheme}:// does not open with storage.options.{scheme}: {told(error)}") from None

    def _patiently(self, uri: str, attempt: Callable[[float], Result]) -> Result:
        """Repeat what may pass by itself, with growing jittered pauses or those that the store asks for, until `deadline_s`.

        Errors of clients do not travel on: their texts may hold what a credential was made of.
        """
        start, count, said = time.monotonic(), 0, ""
        while True:
            left = self.config.deadline_s - (time.monotonic() - start)
            hurried = left < self.config.request_timeout_s  # the last try may be cut short by us: what the store said counts
            try:
                return attempt(max(min(left, self.config.request_timeout_s), 0.05))
            except StorageError:
                raise
            except Exception as error:
                unframed(error)
                option = f"storage.options.{_scheme(uri)}"
                if final(uri, option, error) is not None:
                    raise final(uri, option, error) from None  # type: ignore[misc]  # no name holds it: its frames would
                pause = min(_FIRST_PAUSE_S * 2**count, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
                asked = retry_after_s(error)
                pause, count = max(pause, asked), count + 1
                left = self.config.deadline_s - (time.monotonic() - start)
                said = said if said and hurried and isinstance(error, TimeoutError) else told(error)
                if left <= pause:
                    spent = f"after {count} tries in {time.monotonic() - start:.0f} s"
                    wish = f"; the store asks to wait {asked:.0f} s" if asked else ""
                    limit = f"storage.deadline_s={self.config.deadline_s:g}"
                    raise StorageError(f"{scrub(uri)} could not be read {spent} ({limit}): {said}{wish}") from None
                self._count(0, 0, 1)
                self._tell(uri, error, left)
            time.sleep(pause)

    def _tell(self, uri: str, error: BaseException, left_s: float) -> None:
        """Someone who waits wants to know what for: once it takes long, and not too often."""
        now = time.monotonic()
        if self.config.deadline_s - left_s > _LONGEST_PAUSE_S and now - self._told > _TELL_S:
            self._told = now
            _log.warning("%s does not answer (%s); trying for %.0f s more", scrub(uri), told(error), left_s)


@contextlib.contextmanager
def _local_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(f"{uri}: no such file") from error
    except ValueError as error:  # a NUL, or half of a character
        raise Missing(f"{uri!r}: no such file ({error})") from error
    except OSError as error:
        if error.errno in _NEVER_THERE:
            raise Missing(f"{uri[:_SHOWN]!r}: no such file ({error.strerror})") from error
        raise StorageError(f"{uri}: {error.strerror or error}") from error
