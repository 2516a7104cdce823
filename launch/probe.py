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
from histoscale.eval.embed import embed_patches
from histoscale.eval.encoder import open_encoder, random_floor_spec
from histoscale.eval.floors import FloorsConfig
from histoscale.eval.pool import check_pool
from histoscale.eval.probe import ProbeConfig
from histoscale.eval.scores.interval import IntervalConfig

RESULT = ("encoder", "precision", "dataset", "data_root", "catalog", "cut", "probe", "floors", "interval")


@dataclass(frozen=True)
class Config:
    """encoder: a release, a checkpoint, timm:<name>, random:<folder or timm name> or colour. precision: fp32, bf16, fp16.

    data_root: the folder of the labelled set. catalog: of its slides (dataset=cohort). batch: patches an encoder call.
    device: auto, cpu, cuda.
    """

    encoder: str
    precision: str
    dataset: AnyDataset
    data_root: str
    catalog: str
    cut: CutConfig
    probe: ProbeConfig
    floors: FloorsConfig
    interval: IntervalConfig
    batch: int
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
    device = open_ranks(config.device).device
    patches = open_dataset(config.dataset, config.data_root, config.catalog, config.cut, store)
    encoder = open_encoder(config.encoder, store, device, config.precision)
    floor = random_floor_spec(config.encoder)
    numbers = range(config.floors.initialisations if floor is not None else 0)
    untrained = [open_encoder(str(floor), store, device, config.precision, seed=number) for number in numbers]
    colour = open_encoder("colour", store, device)
    mine, *others = embed_patches([encoder, *untrained, colour], patches, config.batch, journal.path("features"), journal)
    found = compare(mine, others[:-1], others[-1], patches, config.probe, config.floors, config.interval)
    effective = None if patches.mpp is None or patches.size_px is None else encoder.effective_mpp(patches.mpp, patches.size_px)
    seen = "unknown" if effective is None else f"{effective:.4g} µm/px"
    journal.say(f"{encoder.name} on {patches.name}: patches of {patches.size_px} px, the encoder sees {seen}")
    journal.say(found.table())
    about: dict[str, Any] = {"encoder": encoder.name, "encoder_hash": encoder.hash, "precision": config.precision}
    about.update(effective_mpp=effective, transductive=encoder.transductive)
    return {"probe": {**found.summary(), **about}}


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("probe", sys.argv[1:]))
