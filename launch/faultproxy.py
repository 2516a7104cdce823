"""A proxy before an HTTP server that delays, throttles, cuts, corrupts, stalls, refuses and goes away, as told.

Steered by lines of JSON on its input: {"set": {…}} replaces the faults below, {"counts": true} asks what passed. Shares are of
the GET and HEAD requests; which ones follows from the seed and the number of the request, so a run can be repeated.
"""

import asyncio
import contextlib
import json
import sys
from collections import Counter
from typing import Any

from histoscale.data.keys import key

CALM = {
    "seed": 0,
    "delay_s": 0.0,  # added to every request
    "throttle": 0.0,  # share answered with `status`
    "status": 503,
    "retry_after_s": 0,  # said with it, if not 0
    "cut": 0.0,  # share whose reply ends in the middle
    "corrupt": 0.0,  # share whose reply has its middle overwritten
    "stall": 0.0,  # share never answered
    "refuse": 0.0,  # share answered 403
    "out": False,  # no connection is accepted, open ones are dropped
}
_KINDS = ("throttle", "cut", "corrupt", "stall", "refuse")
_SPOILT = 64  # bytes
_LIMIT = 1 << 20


class FaultProxy:
    """One upstream connection for each connection."""

    def __init__(self, port: int) -> None:
        self.port, self.faults, self.counts = port, dict(CALM), Counter[str]()
        self.open: set[asyncio.StreamWriter] = set()
        self.waiting = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        upstream = _Upstream(self.port)
        try:
            while not self.faults["out"] and await self._request(reader, writer, upstream):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # either side went away
        finally:
            self.open.discard(writer)
            writer.close()
            upstream.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: "_Upstream") -> bool:
        """One request and its reply; False when the connection is to end."""
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(_header(head, b"content-length") or 0))
        self.counts["requests"] += 1
        self.waiting += 1
        self.counts["most_at_once"] = max(self.counts["most_at_once"], self.waiting)
        try:
            return await self._reply(head, body, reader, writer, upstream)
        finally:
            self.waiting -= 1

    async def _reply(
        self,
        head: bytes,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: "_Upstream",
    ) -> bool:
        method = head.split(b" ", 1)[0]
        kind = self._fault(self.counts["requests"]) if method in (b"GET", b"HEAD") else None
        if kind:
            self.counts[kind] += 1
        await asyncio.sleep(self.faults["delay_s"])
        if kind == "stall":
            await reader.read(1)  # until the client gives up
            return False
        if kind in ("throttle", "refuse"):
            status = int(self.faults["status"]) if kind == "throttle" else 403
            after = self.faults["retry_after_s"]
            lines = f"HTTP/1.1 {status} Fault\r\nContent-Length: 0\r\n" + (f"Retry-After: {after:g}\r\n" if after else "")
            writer.write(lines.encode() + b"\r\n")
            await writer.drain()
            return True
        answer = await upstream.ask(head + body)
        data = b"" if method == b"HEAD" else await _body(answer, upstream.replies)
        self.counts["bytes"] += len(data)
        if kind == "cut":
            writer.write(answer + data[: len(data) // 2])
            await writer.drain()
            return False
        if kind == "corrupt":
            middle = max(0, len(data) // 2 - _SPOILT // 2)
            data = data[:middle] + b"\xff" * min(_SPOILT, len(data) - middle) + data[middle + _SPOILT :]
        writer.write(answer + data)
        await writer.drain()
        return (_header(answer, b"connection") or b"").lower() != b"close"

    def _fault(self, number: int) -> str | None:
        draw = (key(int(self.faults["seed"]), "fault", number) & 0xFFFFFFFF) / 2**32
        for kind in _KINDS:
            draw -= self.faults[kind]
            if draw < 0:
                return kind
        return None

    def tell(self, line: dict[str, Any]) -> dict[str, Any]:
        """Obey one line; the answer to it."""
        if "set" in line:
            unknown = set(line["set"]) - set(CALM)
            assert not unknown, f"unknown faults {unknown}"
            self.faults = {**CALM, **line["set"]}
            if self.faults["out"]:
                for writer in self.open:
                    writer.transport.abort()
        return {**dict.fromkeys(("requests", "bytes", "most_at_once", *_KINDS), 0), **self.counts}


class _Upstream:
    """The connection to the server. One that the server closed while it was idle is opened again, unseen by the client."""

    replies: asyncio.StreamReader

    def __init__(self, port: int) -> None:
        self.port = port
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> bytes:
        """The head of the reply; its body is next in `replies`."""
        while True:
            fresh = self.writer is None
            if self.writer is None:
                self.replies, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=_LIMIT)
            try:
                self.writer.write(request)
                head = await self.replies.readuntil(b"\r\n\r\n")
                while head.startswith(b"HTTP/1.1 100"):
                    head = await self.replies.readuntil(b"\r\n\r\n")
                return head
            except (OSError, asyncio.IncompleteReadError):
                self.close()
                if fresh:
                    raise

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        found, _, value = line.partition(b":")
        if found.lower() == name:
            return value.strip()
    return None


async def _body(head: bytes, stream: asyncio.StreamReader) -> bytes:
    """The body of a reply as it is framed on the wire."""
    length = _header(head, b"content-length")
    if length is not None:
        return await stream.readexactly(int(length))
    if (_header(head, b"transfer-encoding") or b"").lower() != b"chunked":
        status = head.split(b" ", 2)[1]
        return b"" if status in (b"204", b"304") else await stream.read()
    parts = []
    while True:
        size = await stream.readuntil(b"\r\n")
        data = await stream.readexactly(int(size.split(b";")[0], 16) + 2)
        parts += [size, data]
        if len(data) == 2:
            return b"".join(parts)


async def _main(target: int, port: int) -> None:
    proxy = FaultProxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", port, limit=_LIMIT, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async for line in commands:
        print(json.dumps(proxy.tell(json.loads(line))), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
