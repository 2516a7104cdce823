"""Servers on loopback for the tests: each starts once a session, and tests skip where it is not installed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from histoscale.launch.loopback import Absent, Proxy, Server, azurite, proxy, range_server, s3_server


@pytest.fixture(scope="session")
def azure_server() -> Iterator[Server]:
    """Azurite's blob service."""
    try:
        server = azurite(None)
    except Absent as absent:
        pytest.skip(str(absent))
    with server:
        yield server


@pytest.fixture(scope="session")
def azure_proxy(azure_server: Server) -> Iterator[Proxy]:
    with proxy(azure_server) as found:
        yield found


@pytest.fixture
def calm(azure_proxy: Proxy) -> Iterator[Proxy]:
    """The proxy before Azurite, without faults before and after."""
    azure_proxy.set()
    yield azure_proxy
    azure_proxy.set()


@pytest.fixture(scope="session")
def aws_server() -> Iterator[Server]:
    """moto's S3."""
    try:
        server = s3_server()
    except Absent as absent:
        pytest.skip(str(absent))
    with server:
        yield server


@pytest.fixture(scope="session")
def folder_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """The range server and the folder that it serves."""
    folder = tmp_path_factory.mktemp("served")
    with range_server(folder) as server:
        yield server, folder


def upload(connection: str, files: dict[str, bytes], container: str) -> str:
    """Puts files into a container of an Azurite, made if it is not there; the container's az:// URI."""
    from azure.core.exceptions import ResourceExistsError
    from azure.storage.blob import BlobServiceClient

    with BlobServiceClient.from_connection_string(connection) as service:
        client: Any = service.get_container_client(container)
        with contextlib.suppress(ResourceExistsError):
            client.create_container()
        for name, data in files.items():
            client.upload_blob(name, data, overwrite=True)
    return f"az://{container}"
