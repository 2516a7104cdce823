"""Small public sets in their exact layouts: names, keys and columns as published, random pixels."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from PIL import Image
from scipy import sparse

from histoscale.eval.datasets import bracs, breakhis, hest, tcga
from histoscale.eval.datasets.hest import HestConfig
from histoscale.eval.datasets.public import PublicConfig
from histoscale.eval.datasets.tp53 import Tp53Config

ROOT = Path(__file__).resolve().parents[1]


def public_config(name: str, **changes: Any) -> PublicConfig:
    """The committed configuration, as `dataset=<name> dataset.<key>=<value>` makes it."""
    return PublicConfig(**_committed(name, changes))


def tp53_config(**changes: Any) -> Tp53Config:
    return Tp53Config(**_committed("tp53", changes))


def hest_config(**changes: Any) -> HestConfig:
    return HestConfig(**_committed("hest", changes))


def _committed(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {**yaml.safe_load((ROOT / f"configs/dataset/{name}.yaml").read_text()), **changes}


def _pixel() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    return file.getvalue()


PIXEL = _pixel()


def write_image(path: Path, wide: int, high: int, seed: int) -> None:
    """Random pixels; seed 0 writes the same one pixel, for sets of which only names and headers are looked at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if seed == 0:
        path.write_bytes(PIXEL)
        return
    Image.fromarray(pixels_of(wide, high, seed)).save(path)


def pixels_of(wide: int, high: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (high, wide, 3), np.uint8)


def write_bracs(root: Path, counts: Mapping[str, Sequence[int]] | None = None, pixels: bool = True) -> Path:
    """By default two slides with two regions each a class and part; parts have their own slides."""
    counts = counts or dict.fromkeys(bracs.PARTS, (4,) * 7)
    seed = 0
    for number, (part, of_class) in enumerate(counts.items()):
        for label, count in enumerate(of_class):
            for i in range(count):
                seed += 1
                slide = 1000 + 500 * number + i % 2
                name = f"BRACS_{slide}_{bracs.CLASSES[label]}_{i}.png"
                place = root / f"BRACS_RoI/latest_version/{part}/{label}_{bracs.CLASSES[label]}/{name}"
                write_image(place, 20 + seed % 7, 30 + seed % 5, seed if pixels else 0)
    return root


def write_breakhis(root: Path, images: Mapping[str, Mapping[str, int]], pixels: bool = True) -> Path:
    """images: type -> id -> number of images at 40X; each id also has one at 100X, which is not to be read."""
    seed = 0
    for label, of_id in images.items():
        kind = "B" if breakhis.FOLDERS[label].startswith("benign") else "M"
        for one, count in of_id.items():
            folder = root / f"BreaKHis_v1/histology_slides/breast/{breakhis.FOLDERS[label]}/SOB_{kind}_{label}_14-{one}"
            write_image(folder / f"100X/SOB_{kind}_{label}-14-{one}-100-001.png", 7, 5, 0)
            for i in range(1, count + 1):
                seed += 1
                write_image(folder / f"40X/SOB_{kind}_{label}-14-{one}-40-{i:03d}.png", 35, 23, seed if pixels else 0)
    return root


# Ids by type so that every published count holds; training ids are made up, but for those that share a number with validation.
VALIDATION = {
    "DC": {"15792": 14, "16716": 38, "16875": 14, "2773": 30, "3909": 26, "5287": 23, "5695": 23},
    "F": {"21998CD": 37, "21998EF": 31, "23060CD": 14},
    "MC": {"18842D": 16, "19979": 26},
    "TA": {"15275": 12, "16184CD": 35},
}
TRAIN = {
    "DC": {"20629": 340, "20636": 356},
    "F": {"23060AB": 20, "29960AB": 151},
    "MC": {"18842": 30, "19979C": 33, "13412": 100},
    "TA": {"16184": 20, "13412": 82},
}


def write_gleason(root: Path, counts: Mapping[str, int], cores: int = 3, pixels: bool = True) -> Path:
    """counts: array -> number of patches, over four classes and some cores; folders of cores, as create_patches.py makes them."""
    seed = 0
    for array, count in counts.items():
        inside = "test_patches_750/patho_1" if array == "ZT80" else "train_validation_patches_750"
        for i in range(count):
            seed += 1
            core = f"{array}_{i % cores}_A_1"
            write_image(root / inside / core / f"{core}_patch_{i // cores}_class_{i % 4}.jpg", 750, 750, seed if pixels else 0)
    return root


GENES = [f"GENE{i}" for i in range(hest.GENE_COUNT)]


def write_hest(
    root: Path, task: str, splits: Sequence[tuple[Sequence[str], Sequence[str]]], spots: int = 12, form: str = "csr_matrix",
    size: int = hest.SIDE,
) -> Path:  # fmt: skip
    """Samples of `spots` spots; the expression file has more spots and genes than are asked for, in another order."""
    folder = root / task
    (folder / "splits").mkdir(parents=True)
    (folder / hest.GENES).write_text(json.dumps({"genes": GENES}))
    for number, sides in enumerate(splits):
        for side, samples in zip(("train", "test"), sides, strict=True):
            with (folder / f"splits/{side}_{number}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(hest.COLUMNS)
                writer.writerows([sample, f"patches/{sample}.h5", f"adata/{sample}.h5ad"] for sample in samples)
    for sample in sorted({sample for sides in splits for side in sides for sample in side}):
        write_patches(folder / f"patches/{sample}.h5", sample, spots, size)
        write_expression(folder / f"adata/{sample}.h5ad", sample, spots, form)
    return root


def seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def write_patches(path: Path, sample: str, spots: int, size: int = hest.SIDE) -> None:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["img"] = np.random.default_rng(seed_of(sample)).integers(0, 256, (spots, size, size, 3), np.uint8)
        file["coords"] = np.arange(2 * spots).reshape(spots, 2)
        file["barcode"] = np.array([[f"{sample}-{i}".encode()] for i in range(spots)])


def counts_of(sample: str, spots: int) -> np.ndarray:
    """Raw counts [spots, 50] of GENES."""
    return np.random.default_rng(seed_of(sample) + 1).poisson(3, (spots, hest.GENE_COUNT)).astype(np.float32)


def write_expression(path: Path, sample: str, spots: int, form: str, counts: np.ndarray | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    counts = counts_of(sample, spots) if counts is None else counts
    order = np.random.default_rng(0).permutation(spots + 3)
    genes = ["OTHER", *GENES[::-1], "ANOTHER"]
    whole = np.full((spots + 3, len(genes)), 99, np.float32)
    whole[:spots, 1:-1] = counts[:, ::-1]
    with h5py.File(path, "w") as file:
        for axis, names in (("obs", [f"{sample}-{i}" for i in order]), ("var", genes)):
            group = file.create_group(axis)
            group.attrs["_index"] = "_index" if axis == "obs" else "symbol"
            group[group.attrs["_index"]] = np.array(names, dtype=h5py.string_dtype())
        if form == "array":
            file["X"] = whole[order]
            return
        made = (sparse.csr_matrix if form == "csr_matrix" else sparse.csc_matrix)(whole[order])
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = form, made.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(made, name)


def write_study(root: Path, study: str, mutants: Mapping[str, str], sequenced: Sequence[str]) -> None:
    """mutants: sample -> class of its TP53 variant. Every sample also has one variant of another gene."""
    folder = root / f"{study}{tcga.STUDIES}"
    (folder / "case_lists").mkdir(parents=True)
    lines = ["#version 2.4", "Hugo_Symbol\tEntrez_Gene_Id\tVariant_Classification\tTumor_Sample_Barcode"]
    lines += [f"KRAS\t3845\tMissense_Mutation\t{sample}" for sample in sequenced]
    lines += [f"TP53\t7157\t{kind}\t{sample}" for sample, kind in mutants.items()]
    (folder / tcga.MUTATIONS).write_text("\n".join(lines) + "\n")
    (folder / tcga.SEQUENCED).write_text(
        f"cancer_study_identifier: {folder.name}\nstable_id: {folder.name}_sequenced\n"
        f"case_list_name: Samples with mutation data\ncase_list_ids: " + "\t".join(sequenced) + "\n"
    )


def write_hospitals(root: Path, hospitals: Mapping[str, str]) -> None:
    rows = [f"{code}\t{name}\tsome carcinoma\tNCH" for code, name in hospitals.items()]
    (root / tcga.HOSPITALS).write_text("\n".join(["TSS Code\tSource Site\tStudy Name\tBCR", *rows]) + "\n")


def pin(root: Path) -> None:
    """What `sha256sum` would write for all tables."""
    files = [path for path in sorted(root.rglob("*")) if path.suffix in (".txt", ".tsv")]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root)}" for path in files]
    (root / tcga.PINNED).write_text("\n".join(sums) + "\n")
