"""One file over HTTP, in as many pieces as the line allows: ranges from where it was cut, until the announced size is there."""

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from histoscale.data.clients.faults import retry_after_s
from histoscale.data.journal import Journal, write_json
from histoscale.data.jsonfiles import read_object

BLOCK = 1 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass by themselves


class FetchError(ValueError):
    """A public file that cannot be had; the message names it, the cause, and what to do."""


@dataclass(frozen=True)
class Patience:
    """request_timeout_s: a silent connection is given up and opened anew. deadline_s: so long without one new byte ends it."""

    request_timeout_s: float
    deadline_s: float


@dataclass(frozen=True)
class Digests:
    size: int
    md5: str
    sha256: str


class _Cut(Exception):
    """The connection ended, or the server asks for patience: again, after what its header Retry-After says."""

    def __init__(self, why: str, retry_after: str | None) -> None:
        super().__init__(why)
        self.retry_after = retry_after


def digests_of(path: Path) -> Digests:
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            md5.update(block)
            sha256.update(block)
            size += len(block)
    return Digests(size, md5.hexdigest(), sha256.hexdigest())


def download(url: str, target: Path, most_bytes: int, patience: Patience, journal: Journal) -> None:
    """`url` as the file `target`, which appears when it is whole. A part that is there is gone on with, unless the file at the
    server is another by its size or ETag. Raises FetchError: no such file, no size, too large, no space, no new byte in time."""
    if not url.startswith(("http://", "https://")):
        raise FetchError(f"the URL {url} is none of http or https: give mirror=https://…")
    part = _Part(url, target.with_name(f"{target.name}.partial"), most_bytes)
    moved, pause, most = time.monotonic(), _FIRST_PAUSE_S, part.held
    while True:
        try:
            if part.pull(patience.request_timeout_s, journal):
                break
        except (_Cut, OSError, http.client.HTTPException) as error:
            if part.held > most:  # a server without ranges begins anew each time, which is no progress
                moved, pause, most = time.monotonic(), _FIRST_PAUSE_S, part.held
            wait = max(pause, retry_after_s(error))
            if time.monotonic() + wait - moved > patience.deadline_s:
                raise FetchError(
                    f"{url}: no new byte in {patience.deadline_s:g} s, {part.held} bytes are here ({error}); the same command "
                    "goes on from there"
                ) from error
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
    part.finish(target)


class _Part:
    """What is here of a file, and which file at the server it is a part of."""

    def __init__(self, url: str, path: Path, most_bytes: int) -> None:
        self.url, self.path, self.most_bytes = url, path, most_bytes
        self.about = path.with_name(f"{path.name}.json")
        self.tag, self.size = "", -1
        if path.is_file() and self.about.is_file():
            try:
                known = read_object(self.about)
                self.tag, self.size = str(known["etag"]), int(known["size"])
            except (ValueError, KeyError, TypeError, OverflowError):  # cut off while it was written: begun anew
                self.drop()
        elif path.is_file():
            self.drop()

    @property
    def held(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)
        self.tag, self.size = "", -1

    def pull(self, timeout_s: float, journal: Journal) -> bool:
        """One request, for all that is missing; True when nothing is. Raises _Cut, OSError, HTTPException, FetchError."""
        held = self.held
        if held == self.size:
            return True
        headers = {"Accept-Encoding": "identity", "User-Agent": "histoscale"}
        if held:
            headers["Range"] = f"bytes={held}-"
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=timeout_s) as reply:
                if not self._fits(reply.status, reply.headers, held):
                    return False
                held = self.held
                about = journal.progress(self.size - held, self.path.stem, "bytes")
                with self.path.open("ab") as file, about as progress:
                    while block := reply.read(min(BLOCK, self.size - held + 1)):
                        if held + len(block) > self.size:
                            raise FetchError(f"{self.url} sends more than the {self.size} bytes that it announces: try a mirror=")
                        file.write(block)
                        held += len(block)
                        progress.advance(len(block))
        except urllib.error.HTTPError as error:
            self._refused(error, held)
            return False
        if held < self.size:
            raise _Cut(f"the connection ended at byte {held} of {self.size}", None)
        return True

    def _fits(self, status: int, headers: Message, held: int) -> bool:
        """Whether the reply goes on from `held`; what was held is dropped where it does not."""
        tag = headers.get("ETag", "")
        if status == 206:
            span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            first = span.partition("-")[0]
            if not total.isdigit() or not first.isdigit():
                raise FetchError(f"{self.url} answers a range without saying which: try a mirror=")
            if int(first) != held or (self.tag, self.size) != (tag, int(total)):
                self.drop()  # another file by now: from the beginning
                return False
            return True
        length = headers.get("Content-Length", "")
        if not length.isdigit():
            raise FetchError(f"{self.url} announces no size, so a cut would pass unseen: try a mirror=")
        self.drop()
        self._begin(tag, int(length))
        return True

    def _begin(self, tag: str, size: int) -> None:
        if size > self.most_bytes:
            raise FetchError(f"{self.url} announces {size} bytes: expected at most {self.most_bytes}; is mirror= right?")
        free = shutil.disk_usage(self.path.parent).free
        if size > free:
            raise FetchError(f"{self.path.parent} has {free} bytes free: {self.path.name} needs {size}; make room")
        self.tag, self.size = tag, size
        write_json(self.about, {"url": self.url, "etag": tag, "size": size})
        self.path.touch()

    def _refused(self, error: urllib.error.HTTPError, held: int) -> None:
        if error.code == 416 and held:  # shorter there than what is here
            self.drop()
            return
        if error.code in _PASSING:
            raise _Cut(f"status {error.code}", error.headers.get("Retry-After")) from error
        raise FetchError(f"{self.url} answers {error.code} {error.reason}: expected the file; is mirror= right?") from error

    def finish(self, target: Path) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.replace(target)
        self.about.unlink(missing_ok=True)
