"""Commands that tests start and that may outlast a failed assertion."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """`subprocess.Popen` of text in a session of its own; what of it is left when the test ends, however it ends, is killed."""
    children: list[subprocess.Popen[str]] = []

    def started(words: list[str], **more: Any) -> "subprocess.Popen[str]":
        children.append(subprocess.Popen(words, text=True, start_new_session=True, **more))
        return children[-1]

    yield started
    for child in children:
        with child:
            end(child)


def end(child: "subprocess.Popen[Any]") -> None:
    """Kill a child that leads a session, and what it started: ranks have sessions of their own."""
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(child.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
