"""How a run is asked to stop, and says that it did: apart from the trainer, since every command looks for it and few need a
backbone."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from histoscale.data.readers.deadline import let_go

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_asked: list[int] = []  # signals that `stoppable` raised for: what they raised may have been lost, in a finalizer say


class Preempted(BaseException):
    """The run was asked to stop (SIGTERM, SIGUSR1); step: it has saved itself after so many, None: it had none to save.

    Like KeyboardInterrupt, nothing that handles errors takes it for one.
    """

    def __init__(self, step: int | None = None) -> None:
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped on request{after}; the same command continues")
        self.step = step


@contextmanager
def stoppable() -> Iterator[None]:
    """While inside, SIGTERM and SIGUSR1 raise Preempted wherever the main thread is; whatever else fails from then on is part of
    stopping (a child that had the same signal, say). Outside the main thread nothing is changed."""

    def stop(number: int, frame: FrameType | None) -> None:
        _asked.append(number)
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # those who ask twice must not interrupt the stopping
        let_go(True)  # threads that wait for a decoder would be waited for
        raise Preempted

    with _handled(stop):
        try:
            yield
        except Exception as error:
            if _asked:
                raise Preempted from error
            raise
        finally:
            _asked.clear()
            let_go(False)


def was_asked() -> bool:
    """Whether a signal asked this run to stop: what fails since then is part of stopping."""
    return bool(_asked)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While inside, SIGTERM and SIGUSR1 are only noted in the list that is given, for ranks that must agree where they stop;
    one that came before is in it. What fails after one is part of stopping, as in `stoppable`. Outside the main thread nothing is
    changed."""
    asked = list(_asked)
    with _handled(lambda number, frame: asked.append(number)):
        try:
            yield asked
        except Exception as error:
            if asked:
                raise Preempted from error
            raise


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
