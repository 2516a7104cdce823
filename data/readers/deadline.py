"""Decoding ends, one way or the other: a decoder that nobody can vouch for gets a thread and a time, and may be left behind."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from histoscale.data.processes import detached

T = TypeVar("T")
_standing: dict[str, threading.Thread] = {}  # by slide: calls that were left behind
_stopping = False
_LOOK_S = 0.5  # so often is that looked for


def within(seconds: float, uri: str, decode: Callable[[], T], keeps_time: bool = False) -> T:
    """What `decode` returns or raises. Raises Stands, which names the slide, when that takes longer than `seconds`.

    keeps_time: it raises TimeoutError by itself. Any other is called in a thread of its own, and the caller waits where signals
    reach it. A call in C cannot be ended from outside, so its thread is left behind: nothing waits for it, not even the end of
    the process, and until it returns every later call for the slide is refused at once, so that they do not pile up.
    """
    try:
        return decode() if keeps_time else _in_a_thread(seconds, uri, decode)
    except TimeoutError as error:
        from histoscale.data.readers.pyramid import Stands  # numpy, which a command that only stops needs none of

        raise Stands(f"{uri}: {error} (storage.decode_s={seconds:g})") from error


def let_go(stopping: bool) -> None:
    """While a run is stopping nobody waits for a decoder: what was read is of no use any more. May be called where signals are
    handled."""
    global _stopping
    _stopping = stopping


def _in_a_thread(seconds: float, uri: str, decode: Callable[[], T]) -> T:
    before = _standing.get(uri)
    if before is not None and before.is_alive():
        raise TimeoutError("an earlier call of its decoder has not returned yet")
    thread, outcome = detached(decode)
    until, late = time.monotonic() + seconds, f"its decoder has not returned after {seconds:g} s"
    while thread.is_alive() and (left := until - time.monotonic()) > 0 and not _stopping:
        thread.join(min(left, _LOOK_S))
    if thread.is_alive():
        _standing[uri] = thread
        raise TimeoutError("its decoder had not returned when the run was stopped" if _stopping else late)
    _standing.pop(uri, None)
    return outcome()
