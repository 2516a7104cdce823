"""Real servers on loopback for tests and benchmarks: Azurite, moto's S3, a plain range server, and a proxy that fails as told.

Each runs in a process of its own and ends with the process that started it, however that one ends.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ACCOUNT = "devstoreaccount1"  # Azurite's published account, no secret
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_START_S = 60.0
# A child asks the kernel (Linux: PR_SET_PDEATHSIG = 1) to end with its parent.
_TIED = "import ctypes, os, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


def tied(command: list[str]) -> list[str]:
    """The command as a child that ends with this process, however that one ends."""
    return [sys.executable, "-c", _TIED, *command]


class Absent(RuntimeError):
    """This machine lacks a server; the message says what to install."""


class Server:
    """A process that serves `url`."""

    def __init__(self, command: list[str], url: str, ours: bool) -> None:
        self.url, self._lock = url, threading.Lock()
        if ours:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, text=True)
        else:  # its own chatter goes nowhere
            nowhere = subprocess.DEVNULL
            self.process = subprocess.Popen(
                tied(command), stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].split("/")[0])

    def ask(self, **what: Any) -> dict[str, Any]:
        """One line of JSON there, one back: how our own servers are steered."""
        with self._lock:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise OSError(f"the server at {self.url} is gone (exit code {self.process.poll()})")
        return json.loads(line)


class Proxy(Server):
    """Stands before a server; see launch/faultproxy.py for what it can do."""

    def set(self, **faults: float | int | bool) -> None:
        """Replace all faults; what is not named is off."""
        self.ask(set=faults)

    def counts(self) -> dict[str, int]:
        """So far: requests, bytes of replies' bodies, most_at_once (requests in flight), and faults by kind."""
        return self.ask(counts=True)


def _ours(module: str, arguments: list[str], port: int, kind: type[Server] = Server) -> Any:
    """A server of this package: it prints its port (0: any that is free), and ends when its input does."""
    server = kind([sys.executable, "-m", f"histoscale.launch.{module}", *arguments, str(port)], "", ours=True)
    assert server.process.stdout is not None
    line = server.process.stdout.readline()
    if not line:
        server.stop()
        raise OSError(f"histoscale.launch.{module} did not start")
    server.url = f"http://127.0.0.1:{int(line)}"
    return server


def range_server(folder: Path, port: int = 0) -> Server:
    """Serves the files of a folder over HTTP, and its subfolders as buckets of a Google store."""
    return _ours("rangeserver", [str(folder)], port)


def proxy(target: Server, port: int = 0) -> Proxy:
    """A proxy before `target`; its url has the target's path."""
    found: Proxy = _ours("faultproxy", [str(target.port)], port, Proxy)
    path = target.url.split("/", 3)[3:]
    found.url = "/".join([found.url, *path])
    return found


def azurite(folder: Path | None) -> Server:
    """The blob service of Azurite with its files in `folder`, or in memory. Raises Absent where it is not installed."""
    program = find_azurite()
    place = ["--location", str(folder)] if folder is not None else ["--inMemoryPersistence"]
    for _ in range(5):  # the port may be taken between its choice and its use
        port = _free_port()
        command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent", "--skipApiVersionCheck",
                   "--disableTelemetry", *place]  # fmt: skip
        server = Server(command, f"http://127.0.0.1:{port}/{ACCOUNT}", ours=False)
        if _answers(server):
            return server
        server.stop()
    raise OSError(f"{program} did not start")


def find_azurite() -> str:
    """The path of azurite-blob: $AZURITE (the program, or the folder that npm installed it into), PATH, ./node_modules."""
    given = os.environ.get("AZURITE", "")
    places = [given, f"{given}/node_modules/.bin/azurite-blob", str(Path("node_modules/.bin/azurite-blob").resolve())]
    program = next((place for place in places if place and os.path.isfile(place)), None) or shutil.which("azurite-blob")
    if program is None or shutil.which("node") is None:
        raise Absent("no azurite-blob: `npm install azurite` here, or set AZURITE to the folder where it is installed")
    return program


def connection_string(url: str, key: str = ACCOUNT_KEY) -> str:
    """How clients open the account of an Azurite at `url` (or of a proxy before it)."""
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={url};"


def s3_server() -> Server:
    """moto's S3 server, in memory. Raises Absent where moto is not installed."""
    try:
        import moto.server  # noqa: F401  (the tests' extra)
    except ImportError as error:
        raise Absent("no moto: pip install 'moto[server]'") from error
    for _ in range(5):
        port = _free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = Server(command, f"http://127.0.0.1:{port}", ours=False)
        if _answers(server):
            return server
        server.stop()
    raise OSError("moto's server did not start")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _answers(server: Server) -> bool:
    """Waits until the port accepts; False when the process ends before."""
    until = time.monotonic() + _START_S
    while time.monotonic() < until and server.process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", server.port), 1).close()
            return True
        except OSError:
            time.sleep(0.05)
    return False


@contextlib.contextmanager
def filled_container(server: Server, files: dict[str, Path]) -> Iterator[str]:
    """A container of an Azurite that holds the files under their names; gives its az:// URI."""
    from azure.storage.blob import BlobServiceClient

    with BlobServiceClient.from_connection_string(connection_string(server.url)) as service:
        container = service.create_container(f"slides{time.time_ns()}")
        for name, path in files.items():
            with path.open("rb") as file:
                container.upload_blob(name, file, overwrite=True)
        yield f"az://{container.container_name}"
        container.delete_container()
