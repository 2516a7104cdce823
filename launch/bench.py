"""How fast: reading, views and training steps, each beside a limit or a plain implementation, in shuffled rounds of one run.

Examples:
    histoscale bench what=read out=runs/bench                               # draws a synthetic slide first
    histoscale bench what=read catalog=runs/catalog rounds=9 out=runs/bench_read
    histoscale bench what=read catalog=runs/catalog sampler.grid=8 'sampler.mpps=[0.25]' 'sampler.weights=[1]' out=runs/bench_grid
    histoscale bench what=catalog out=runs/bench_catalog                    # simulates 100,000 slides: 3 GB in out
    histoscale bench what=remote catalog=runs/catalog out=runs/bench_remote # Azurite behind a proxy that delays
    histoscale bench what=views out=runs/bench_views                        # augmentation and stain normalisation, ms a patch
    histoscale bench what=train train.recipe=demo out=runs/bench_train      # a training step by part, beside the plainest one
    histoscale bench what=probe rounds=1 out=runs/bench_probe               # a linear probe with its selection, and eva's
    histoscale bench what=mil rounds=3 out=runs/bench_mil                   # 1,000 slides of 10,000 tiles: 20 GB in out
    histoscale bench what=soak out=runs/bench_soak                         # half an hour of faults: does anything grow?

Trust the ratios: each is taken within a round and its median over rounds is printed. Rates move with the machine's load.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from histoscale.data.cohort.write import CohortConfig
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.memory import StreamConfig
from histoscale.data.normalise.macenko import MacenkoConfig
from histoscale.data.normalise.reinhard import ReinhardConfig
from histoscale.data.normalise.vahadane import VahadaneConfig
from histoscale.data.plan import SamplerConfig
from histoscale.data.storage import StorageConfig
from histoscale.data.tissue import TissueConfig
from histoscale.data.views import ViewsConfig
from histoscale.eval.eva import EvaConfig
from histoscale.eval.probe import ProbeConfig
from histoscale.launch.bench_catalog import ScaleConfig
from histoscale.launch.bench_probe import ProbedConfig
from histoscale.launch.bench_remote import RemoteConfig

RESULT = (
    "what", "catalog", "seed", "rounds", "visits", "batch", "sampler", "cohort", "tissue", "catalog_scale", "remote",
    "views", "macenko", "vahadane", "reinhard", "train", "probe", "eva", "probed", "bagged", "soak",
)  # fmt: skip
SUBJECTS = (
    "read",
    "catalog",
    "remote",
    "views",
    "train",
    "probe",
    "mil",
    "soak",
)  # function NAME of bench_NAME, imported alone: memory is measured


@dataclass(frozen=True)
class TrainingConfig:
    """recipe, overrides: of `pretrain`. steps: timed in a round, after one that warms up. plain: whether tests/plain_step.py
    runs beside it."""

    recipe: str
    overrides: list[str]
    steps: int
    plain: bool


@dataclass(frozen=True)
class BaggedConfig:
    """slides, tiles, width, dtype: of the stores, fewer slides where they would take more than `disk_share` of what is free on
    the disk. bag: tiles drawn of a slide. mil, overrides: the model of the epoch, as for `histoscale mil`. cache_bytes,
    read_threads: of the reader; torch_threads: of the model."""

    slides: int
    tiles: int
    width: int
    dtype: str
    disk_share: float
    bag: int
    mil: str
    overrides: list[str]
    cache_bytes: int
    read_threads: int
    torch_threads: int


@dataclass(frozen=True)
class FaultsConfig:
    """delay_s: added to every request. throttle, cut, corrupt, stall: shares of the requests (launch/faultproxy.py). outage_s:
    how long the store is gone in every `outage_every_s`."""

    delay_s: float
    throttle: float
    cut: float
    corrupt: float
    stall: float
    outage_s: float
    outage_every_s: float


@dataclass(frozen=True)
class SoakConfig:
    """minutes: of pretraining. opens, embeds: slides. look_s: between two looks. warm_up: share of a series that is left out.
    blocks: of looks, whose medians are fitted. confidence: of the intervals. cohort, pretrain, embed: what these commands take
    besides their inputs and `out`."""

    minutes: float
    opens: int
    embeds: int
    look_s: float
    warm_up: float
    blocks: int
    confidence: float
    faults: FaultsConfig
    cohort: list[str]
    pretrain: list[str]
    embed: list[str]


@dataclass(frozen=True)
class Config:
    """what: one of SUBJECTS. catalog: null draws one slide. visits: grid^2 patches each, that every method reads in a round.
    batch: slots of the stream."""

    what: str
    catalog: str | None
    seed: int
    rounds: int
    visits: int
    batch: int
    sampler: SamplerConfig
    views: ViewsConfig
    macenko: MacenkoConfig
    vahadane: VahadaneConfig
    reinhard: ReinhardConfig
    stream: StreamConfig
    storage: StorageConfig
    tissue: TissueConfig
    cohort: CohortConfig
    catalog_scale: ScaleConfig
    remote: RemoteConfig
    train: TrainingConfig
    probe: ProbeConfig
    eva: EvaConfig
    probed: ProbedConfig
    bagged: BaggedConfig
    soak: SoakConfig
    out: str
    logging: JournalConfig


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Measure `what`, print its table, and return its numbers. Raises ValueError for another subject."""
    if config.what not in SUBJECTS:
        raise ValueError(f"what={config.what!r} is not measured: expected {' or '.join(SUBJECTS)}")
    measure = getattr(import_module(f"histoscale.launch.bench_{config.what}"), config.what)
    return {"bench": {config.what: measure(config, journal)}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("bench", sys.argv[1:]))
