"""Any store that fsspec knows: s3 (s3fs), gs (gcsfs), http(s), memory; az and abfs build on it in azure.py."""

import asyncio
import logging
import posixpath
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp
import fsspec
from yarl import URL

from histoscale.data.clients import Info
from histoscale.data.clients.faults import Refusal, Whole

Result = TypeVar("Result")

CONNECTIONS = 256  # at most so many open in a process; how many are used, the visits in flight decide
_TAGS = ("ETag", "etag", "e_tag", "md5Hash", "Last-Modified", "last_modified", "LastModified", "updated", "created", "mtime")


class Filesystem:
    """A filesystem of fsspec on fsspec's one loop of this process."""

    def __init__(self, scheme: str, options: dict[str, Any], kind: Any = None) -> None:
        # Instances that fsspec keeps may belong to a loop that is gone, and then every reply is an exception.
        self.fs: Any = (kind or fsspec.get_filesystem_class(scheme))(skip_instance_cache=True, **options)

    def ranges(self, uri: str, spans: Sequence[tuple[int, int]], timeout_s: float, alone: bool) -> list[bytes | BaseException]:
        path = self.fs._strip_protocol(uri)
        if not self.fs.async_impl:
            starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
            return self.fs.cat_ranges([path] * len(spans), starts, stops, on_error="return")
        return self._wait(self._all(path, spans, timeout_s))

    async def _all(self, path: str, spans: Sequence[tuple[int, int]], timeout_s: float) -> list[bytes | BaseException]:
        async def one(start: int, stop: int) -> bytes:
            async with asyncio.timeout(timeout_s):
                return await self._get(path, start, stop)

        return await asyncio.gather(*(one(start, stop) for start, stop in spans), return_exceptions=True)

    async def _get(self, path: str, start: int, stop: int) -> bytes:
        return await self.fs._cat_file(path, start=start, end=stop)

    def info(self, uri: str, timeout_s: float) -> Info:
        found = self._call("info", uri, timeout_s)
        tag = next((str(found[name]) for name in _TAGS if found.get(name)), "")
        return Info(found.get("type") == "directory", None if found.get("size") is None else int(found["size"]), bare(tag))

    def children(self, uri: str, timeout_s: float) -> list[str]:
        entries = self._call("ls", uri, timeout_s, detail=True, refresh=True)
        return [posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry.get("type") != "directory"]

    def _call(self, method: str, uri: str, timeout_s: float, **options: Any) -> Any:
        """One call of the filesystem, never from its listing cache."""
        self.fs.invalidate_cache()
        path = self.fs._strip_protocol(uri)
        if not self.fs.async_impl:
            return getattr(self.fs, method)(path, **options)

        async def call() -> Any:
            async with asyncio.timeout(timeout_s):
                return await getattr(self.fs, f"_{method}")(path, **options)

        return self._wait(call())

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.fs.loop).result()


class S3(Filesystem):
    """s3fs, with as many connections as the other clients, and without repeats of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        config = {"max_pool_connections": CONNECTIONS, "retries": {"total_max_attempts": 1, "mode": "standard"}}
        super().__init__("s3", {**options, "config_kwargs": {**config, **options.get("config_kwargs", {})}})
        self.fs.retries = 1


class Google(Filesystem):
    """gcsfs by its JSON interface alone: by default it asks by gRPC, past `endpoint_url`, for the bucket's kind."""

    def __init__(self, options: dict[str, Any]) -> None:
        from gcsfs.core import GCSFileSystem  # an extra

        super().__init__("gs", options, GCSFileSystem)
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs every failure with a traceback; the caller tells it


class Http(Filesystem):
    """Plain servers: fsspec's session with its options; the requests are this file's own."""

    def __init__(self, scheme: str, options: dict[str, Any]) -> None:
        super().__init__(scheme, {**options, "get_client": session})

    async def _get(self, path: str, start: int, stop: int) -> bytes:
        return await get_range(await self.fs.set_session(), URL(path), start, stop, {"Range": f"bytes={start}-{stop - 1}"})


async def session(loop: asyncio.AbstractEventLoop | None = None, **options: Any) -> aiohttp.ClientSession:
    """A pool of connections on the running loop."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS), **options)


async def get_range(pool: aiohttp.ClientSession, url: URL, start: int, stop: int, headers: dict[str, str]) -> bytes:
    """The reply to one GET by range. Raises Refusal for another status, Whole where the server knows no ranges."""
    async with pool.get(url, headers={"Accept-Encoding": "identity", **headers}) as reply:
        if reply.status == 206 or (reply.status == 200 and reply.content_length == stop - start and start == 0):
            return await reply.read()
        if reply.status == 200:
            raise Whole(f"the range {start}-{stop} was asked for and all {reply.content_length} bytes came")
        code = reply.headers.get("x-ms-error-code", "")
        raise Refusal(reply.status, f"{reply.reason or ''} {code}".strip(), reply.headers)


def bare(tag: str) -> str:
    """An etag without its quotes, which some clients keep and some drop."""
    return tag.removeprefix("W/").strip('"')
