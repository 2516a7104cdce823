"""What is an encoder worth on labelled patches, and how far above an untrained one and above plain colour is it?

    histoscale probe encoder=runs/release dataset=cohort data_root=runs/cohort catalog=runs/catalog
    histoscale probe encoder=timm:vit_small_patch14_dinov2.lvd142m dataset=folder data_root=~/tiles

Linear and kNN probes, chosen inside the training patients and then scored on the internal test and the external site, each beside
the floors `random` (untrained, five initialisations) and `colour` (42 numbers), with 95 % intervals over patients.
"""

import sys
from dataclasses import dataclass
from typing import Any

from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.ranks import open_ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.compare import compare
from histoscale.eval.datasets.cohort import CutConfig
from histoscale.eval.datasets.opening import AnyDataset, open_dataset
from histoscale.eval.encoder import open_encoder, random_floor_spec
from histoscale.eval.features import embed_patches
from histoscale.eval.floors import FloorsConfig
from histoscale.eval.pool import check_pool
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.resolution import ResolutionConfig, sight_of, view_of
from histoscale.eval.scores.interval import IntervalConfig

RESULT = ("encoder", "precision", "dataset", "data_root", "catalog", "cut", "resolution", "probe", "floors", "interval")


@dataclass(frozen=True)
class Config:
    """encoder: a release, a checkpoint, timm:<name>, hf:<name or folder>, hf-hub:<name>, random:<one of these> or colour.
    precision: fp32, bf16, fp16.

    data_root: the folder of the labelled set. catalog: of its slides (dataset=cohort). batch: patches an encoder call.
    threads: that decode ahead. device: auto, cpu, cuda.
    """

    encoder: str
    precision: str
    dataset: AnyDataset
    data_root: str
    catalog: str
    cut: CutConfig
    resolution: ResolutionConfig
    probe: ProbeConfig
    floors: FloorsConfig
    interval: IntervalConfig
    batch: int
    threads: int
    device: str
    storage: StorageConfig
    logging: JournalConfig
    out: str


def identity(config: Config) -> dict[str, Any]:
    """The bytes behind the names: weights and data."""
    store = Store(config.storage)
    encoder = open_encoder(config.encoder, store, "cpu", config.precision)
    patches = open_dataset(config.dataset, config.data_root, config.catalog, config.cut, store)
    return {"encoder_hash": encoder.hash, "data_hash": patches.hash}


def run(config: Config, journal: Journal) -> dict[str, Any]:
    check_pool(config.probe.pool)
    store = Store(config.storage)
    ranks = open_ranks(config.device)
    device = ranks.device
    patches = open_dataset(config.dataset, config.data_root, config.catalog, config.cut, store)
    encoder = open_encoder(config.encoder, store, device, config.precision)
    floor = random_floor_spec(config.encoder)
    numbers = range(config.floors.initialisations if floor is not None else 0)
    untrained = [open_encoder(str(floor), store, device, config.precision, seed=number) for number in numbers]
    colour = open_encoder("colour", store, device)
    mine, *others = embed_patches(
        [encoder, *untrained, colour], patches, config.resolution, config.batch, config.threads, journal.path("features"),
        journal, ranks,
    )  # fmt: skip
    found = compare(mine, others[:-1], others[-1], patches, config.probe, config.floors, config.interval)
    assert mine.sizes is not None
    sight = sight_of(mine.sizes, view_of(encoder.size_px, encoder.interpolation, config.resolution, patches.mpp), patches.mpp)
    journal.say(f"{encoder.name} on {patches.name}, resolution={config.resolution.name}: the encoder sees {sight}")
    journal.say(found.table())
    about: dict[str, Any] = {"encoder": encoder.name, "encoder_hash": encoder.hash, "precision": config.precision}
    about.update(effective_mpp=sight.effective_mpp and sight.effective_mpp.median, transductive=encoder.transductive)
    return {"probe": {**found.summary(), **about}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("probe", sys.argv[1:]))
