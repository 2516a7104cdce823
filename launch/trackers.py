"""Rows of metrics for people who watch elsewhere: Weights & Biases and TensorBoard, from rank 0, beside metrics.jsonl."""

import os
from collections.abc import Callable
from typing import Any

from histoscale.data.journal import Journal, plain
from histoscale.data.secrets import scrub_streams, scrubbed

MODES = ("off", "auto", "offline", "online")


class TrackerError(ValueError):
    """A tracker that cannot be written to; the message names the key."""


class Tracked(Journal):
    """The journal, whose rows with a step also go to `sinks`: functions of the numbers and the step."""

    def __init__(self, journal: Journal, sinks: list[Callable[[dict[str, float], int], None]]) -> None:
        super().__init__(journal.out, journal.config, journal.main)
        self.sinks = sinks

    def row(self, **values: Any) -> None:
        super().row(**values)
        step = values.get("step")
        if step is None:
            return
        numbers = {name: float(x) for name, x in plain(values).items() if isinstance(x, int | float) and name != "step"}
        for sink in self.sinks:
            sink(numbers, int(step))


def tracked(journal: Journal, values: dict[str, Any]) -> Journal:
    """The journal itself, or one that also tells those that logging.wandb and logging.tensorboard name.

    values: the run's configuration. wandb=auto is online where there is a key, otherwise offline. Raises TrackerError for another
    word or a package that is absent.
    """
    if journal.config.wandb not in MODES:
        raise TrackerError(f"logging.wandb is {journal.config.wandb!r}: expected one of {', '.join(MODES)}")
    if not journal.main:
        return journal
    sinks = []
    if journal.config.wandb != "off":
        sinks.append(_wandb(journal, values))
    if journal.config.tensorboard:
        sinks.append(_tensorboard(journal))
    return Tracked(journal, sinks) if sinks else journal


def wandb_mode(wanted: str) -> str:
    """online or offline. auto looks for a key where wandb itself would: its variable, and the netrc of a login."""
    if wanted != "auto":
        return wanted
    import wandb

    return "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"


def _wandb(journal: Journal, values: dict[str, Any]) -> Callable[[dict[str, float], int], None]:
    import wandb  # half a second, and not everywhere

    scrub_streams()  # wandb keeps what is printed, as it finds it
    run = wandb.init(
        project=journal.config.wandb_project,
        mode="online" if wandb_mode(journal.config.wandb) == "online" else "offline",
        dir=journal.out,
        config=scrubbed(values),
        settings=wandb.Settings(x_disable_meta=True),  # it would keep the command line, which may hold a credential
    )
    return lambda numbers, step: run.log(numbers, step=step)


def _tensorboard(journal: Journal) -> Callable[[dict[str, float], int], None]:
    """Event files in out/tensorboard; what a run that is continued had told beyond its checkpoint is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrackerError(
            f"logging.tensorboard=true needs the package tensorboard: install it, or set it to false ({error})"
        ) from error
    writers: list[SummaryWriter] = []

    def tell(numbers: dict[str, float], step: int) -> None:
        if not writers:
            writers.append(SummaryWriter(str(journal.out / "tensorboard"), purge_step=step))
        for name, value in numbers.items():
            writers[0].add_scalar(name, value, step)
        writers[0].flush()

    return tell
