"""Every labelled set by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from histoscale.data.catalog import open_catalog
from histoscale.data.storage import Store, join
from histoscale.eval.datasets.bach import open_bach
from histoscale.eval.datasets.bracs import open_bracs
from histoscale.eval.datasets.breakhis import open_breakhis
from histoscale.eval.datasets.cohort import CutConfig, open_cohort
from histoscale.eval.datasets.consep import open_consep
from histoscale.eval.datasets.crc import open_crc
from histoscale.eval.datasets.folder import FolderConfig, open_folder
from histoscale.eval.datasets.gleason import open_gleason
from histoscale.eval.datasets.hest import HestConfig
from histoscale.eval.datasets.masks import LabelledMasks
from histoscale.eval.datasets.mhist import open_mhist
from histoscale.eval.datasets.monusac import open_monusac
from histoscale.eval.datasets.patches import DatasetConfig, DatasetError, LabelledPatches
from histoscale.eval.datasets.pcam import open_pcam
from histoscale.eval.datasets.public import PublicConfig
from histoscale.eval.datasets.tp53 import Tp53Config, open_tp53

PUBLIC = ("bach", "bracs", "breakhis", "consep", "crc", "crc_nonorm", "gleason", "mhist", "monusac", "pcam", "pcam_10shot")
OWN_SCHEMA = ("folder", "tp53", "hest")


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return str(name) if name in OWN_SCHEMA else "public" if name in PUBLIC else "roles"


# Which schema a configuration has follows from its name.
AnyDataset = Annotated[
    Annotated[DatasetConfig, Tag("roles")]
    | Annotated[FolderConfig, Tag("folder")]
    | Annotated[Tp53Config, Tag("tp53")]
    | Annotated[HestConfig, Tag("hest")]
    | Annotated[PublicConfig, Tag("public")],
    Discriminator(_kind),
]


@dataclass(frozen=True)
class Place:
    """Where a set lies. root: its folder; catalog: of its slides, for sets that are cut from slides; cut.threads also decode."""

    data_root: str
    catalog: str
    cut: CutConfig
    store: Store

    @property
    def root(self) -> Path:
        return Path(self.data_root).expanduser()


def _cohort(config: DatasetConfig, place: Place) -> LabelledPatches:
    catalog = open_catalog(place.catalog, place.store)
    return open_cohort(join(place.data_root, "patches.parquet"), catalog, place.store, config, place.cut)


def _tp53(config: Tp53Config, place: Place) -> LabelledPatches:
    return open_tp53(place.root, config, open_catalog(place.catalog, place.store), place.store, place.cut)


# name -> (its configuration, where it lies) -> patches. A set is added here and as configs/dataset/<name>.yaml.
OPENERS: dict[str, Callable[[Any, Place], LabelledPatches]] = {
    "cohort": _cohort,
    "folder": lambda config, place: open_folder(place.root, config, place.cut.threads),
    "bach": lambda config, place: open_bach(place.root, config, place.cut.threads),
    "bracs": lambda config, place: open_bracs(place.root, config, place.cut.threads),
    "breakhis": lambda config, place: open_breakhis(place.root, config, place.cut.threads),
    "gleason": lambda config, place: open_gleason(place.root, config, place.cut.threads),
    "tp53": _tp53,
    "crc": lambda config, place: open_crc(place.root, config, place.cut.threads),
    "crc_nonorm": lambda config, place: open_crc(place.root, config, place.cut.threads),
    "mhist": lambda config, place: open_mhist(place.root, config, place.cut.threads),
    "pcam": lambda config, place: open_pcam(place.root, config),
    "pcam_10shot": lambda config, place: open_pcam(place.root, config),
}


CUT = ("cohort", "tp53")  # from the slides of a catalog

# Sets with a class for every pixel.
MASKS: dict[str, Callable[[Path, PublicConfig], LabelledMasks]] = {"consep": open_consep, "monusac": open_monusac}
SPOTS = "hest"  # numbers to regress, task by task: `open_hest`


def open_dataset(
    dataset: DatasetConfig | FolderConfig | PublicConfig, data_root: str, catalog: str, cut: CutConfig, store: Store
) -> LabelledPatches:
    """Raises DatasetError for an unknown name or a set that cannot be used; for cohort also what open_catalog raises."""
    if dataset.name not in OPENERS:
        raise DatasetError(f"dataset.name is {dataset.name!r}: expected {', '.join(OPENERS)}")
    return OPENERS[dataset.name](dataset, Place(data_root, catalog, cut, store))
