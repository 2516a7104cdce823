"""A plain HTTP server of a folder: HEAD, GET, Range, ETag.

Its subfolders also answer as buckets of a Google store: the part of the JSON and XML interfaces that reads need.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_OBJECTS = "/storage/v1/b/"


class Folder(BaseHTTPRequestHandler):
    """Answers from `root`; nothing outside it."""

    root: Path
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}
        if _OBJECTS in path:
            self._google(path.split(_OBJECTS, 1)[1], query, body)
        elif "list-type" in query:
            self._send(200, _listing_xml(self._below(unquote(path.strip("/")), query)), body, "application/xml")
        else:
            self._file(unquote(path.lstrip("/")), body)

    def _google(self, rest: str, query: dict[str, str], body: bool) -> None:
        """b/<bucket>/o[/<object>] of the JSON interface."""
        bucket, _, name = rest.partition("/o")
        name = unquote(name.lstrip("/"))
        if not name:
            self._send(200, json.dumps(_listing_json(bucket, self._below(bucket, query))).encode(), body, "application/json")
        elif query.get("alt") == "media":
            self._file(f"{bucket}/{name}", body)
        else:
            path = self._inside(f"{bucket}/{name}")
            found = _object(bucket, name, path) if path is not None else {"error": {"code": 404, "message": "Not Found"}}
            self._send(404 if path is None else 200, json.dumps(found).encode(), body, "application/json")

    def _below(self, bucket: str, query: dict[str, str]) -> tuple[list[tuple[str, Path]], list[str]]:
        """(objects, folders) directly below the prefix, by their names in the bucket."""
        prefix = query.get("prefix", "")
        folder = self.root / bucket / prefix.rpartition("/")[0]
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        names = [(str(entry.relative_to(self.root / bucket)), entry) for entry in entries]
        names = [(name, entry) for name, entry in names if name.startswith(prefix) or f"{name}/".startswith(prefix)]
        files = [(name, entry) for name, entry in names if entry.is_file()]
        return files, [f"{name}/" for name, entry in names if entry.is_dir()]

    def _inside(self, name: str) -> Path | None:
        path = (self.root / name).resolve()
        return path if path.is_file() and path.is_relative_to(self.root) else None

    def _file(self, name: str, body: bool) -> None:
        path = self._inside(name)
        if path is None:
            self._send(404, b"", body, "text/plain")
            return
        stat = path.stat()
        first, last = 0, stat.st_size - 1
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
            if first > last:
                self._send(416, b"", body, "text/plain")
                return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{stat.st_size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')
        self.send_header("Last-Modified", self.date_time_string(int(stat.st_mtime)))
        self.end_headers()
        if body:
            with path.open("rb") as file:
                self.wfile.write(os.pread(file.fileno(), last + 1 - first, first))

    def _send(self, status: int, data: bytes, body: bool, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


def _object(bucket: str, name: str, path: Path) -> dict[str, Any]:
    stat = path.stat()
    tag = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
    return {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(stat.st_size), "etag": tag, "generation": "1",
            "updated": "2024-01-01T00:00:00.000Z", "timeCreated": "2024-01-01T00:00:00.000Z"}  # fmt: skip


def _listing_json(bucket: str, found: tuple[list[tuple[str, Path]], list[str]]) -> dict[str, Any]:
    objects, folders = found
    return {"kind": "storage#objects", "items": [_object(bucket, name, path) for name, path in objects], "prefixes": folders}


def _listing_xml(found: tuple[list[tuple[str, Path]], list[str]]) -> bytes:
    objects, folders = found
    rows = "".join(
        f"<Contents><Key>{escape(name)}</Key><Size>{path.stat().st_size}</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>{path.stat().st_mtime_ns:x}</ETag></Contents>"
        for name, path in objects
    )
    rows += "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
    return f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>'.encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is its own business
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def main() -> None:
    Folder.root = Path(sys.argv[1]).resolve()
    server = _Server(("127.0.0.1", int(sys.argv[2])), Folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()  # until the process that started this one is gone


if __name__ == "__main__":
    main()
