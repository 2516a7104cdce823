"""Public sets in their exact layouts, small: names, folders, keys and columns as published, a few images of a few pixels."""

import csv
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

BACH = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}
CRC = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
PCAM = ("train", "valid", "test")
MHIST_COLUMNS = ["Image Name", "Majority Vote Label", "Number of Annotators who Selected SSA (Out of 7)", "Partition"]


def picture(path: Path, seed: int, width: int = 8, height: int = 6) -> np.ndarray:
    """A file of noise; its pixels [h, w, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_bach(root: Path, each: int = 100) -> Path:
    """The first `each` of the 100 photographs of every class, and the organisers' list of them."""
    photos = root / "ICIAR2018_BACH_Challenge/Photos"
    rows = []
    for label, (name, prefix) in enumerate(BACH.items()):
        for number in range(1, each + 1):
            picture(photos / name / f"{prefix}{number:03}.tif", 1000 * label + number)
            rows.append((f"{prefix}{number:03}.tif", name))
    with (photos / "microscopy_ground_truth.csv").open("w", newline="") as file:
        csv.writer(file).writerows(reversed(rows))
    return root


def write_crc(root: Path, train: str = "NCT-CRC-HE-100K", each: int = 2) -> Path:
    for part, name in enumerate((train, "CRC-VAL-HE-7K")):
        for label, kind in enumerate(CRC):
            for number in range(each):
                middle = "TCGA-" if part else ""
                place = root / name / kind / f"{kind}-{middle}{'AB'[number % 2]}{number:03}QX.tif"
                picture(place, 100_000 * part + 100 * label + number, 8, 8)
    return root


def write_mhist(root: Path, each: int = 3) -> Path:
    """Rows of both partitions and classes by turns, so that the order of the table is no order of names."""
    rows = []
    for number in range(4 * each):
        label, partition = ("SSA", "HP")[number % 2], ("train", "test")[number // 2 % 2]
        votes = 4 + number % 4 if label == "SSA" else number % 4
        name = f"MHIST_{chr(ord('z') - number)}aa.png"
        picture(root / "mhist/images" / name, number, 8, 8)
        rows.append([name, label, str(votes), partition])
    with (root / "mhist/annotations.csv").open("w", newline="") as file:
        csv.writer(file).writerows([MHIST_COLUMNS, *rows])
    return root


def write_pcam(root: Path, tiles: int = 12, side: int = 96, chunk: int | None = 4, slides: bool = True) -> Path:
    """`tiles` of each split in turns without and with tumour, three tiles of a slide; chunk: rows of a chunk, None for none."""
    root.mkdir(parents=True, exist_ok=True)
    for part, split in enumerate(PCAM):
        stem = root / f"camelyonpatch_level_2_split_{split}"
        labels = np.arange(tiles) % 2
        pixels = np.random.default_rng(part).integers(0, 256, (tiles, side, side, 3), np.uint8)
        chunks = None if chunk is None else (chunk, side, side, 3)
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=pixels, chunks=chunks, compression=None if chunk is None else "gzip")
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file.create_dataset("y", data=labels.astype(np.uint8).reshape(-1, 1, 1, 1))
        if slides:
            names = {"train": "camelyon16_train_tumor", "valid": "camelyon16_train_normal", "test": "camelyon16_test"}
            with Path(f"{stem}_meta.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi"])
                for i in range(tiles):
                    label = bool(labels[i])
                    writer.writerow([i, 100 + i, 200 + i, label, label, f"{names[split]}_{i // 3 + 1:03}"])
    return root
