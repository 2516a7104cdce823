"""What the reader of the README has on disk before the first command, small: slides, labelled tiles, weights, a blob store."""

import csv
import os
import shutil
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import timm
import torch
from loopback_fixtures import upload
from PIL import Image
from safetensors.torch import save_file
from set_fixtures import write_crc, write_pcam
from slide_fixtures import tissue_pixels, write_slide
from slide_layouts import write_camelyon16, write_panda, write_rows, write_tcga

from histoscale.launch import up
from histoscale.launch.loopback import Server, connection_string

ROOT = Path(__file__).resolve().parents[1]
SITES = ("north", "south", "west")
PATIENTS = 24
SHARDS = 42  # train-{000..041}.tar
HOSPITALS = (
    ("21", "Fox Chase Cancer Center", "Lung squamous cell carcinoma"),
    ("46", "St. Joseph's Medical Center (MD)", "Lung squamous cell carcinoma"),
    ("64", "Mayo Clinic - Rochester", "Lung adenocarcinoma"),
)


@dataclass(frozen=True)
class World:
    """folder: where the reader stands. home: what ~ is. environment: of the shell."""

    folder: Path
    home: Path
    environment: dict[str, str]


def lay(root: Path, shown_manifest: str, azure: Server) -> World:
    """Everything that the examples name and none of them makes. shown_manifest: the README's own table."""
    folder, home = root / "work", root / "home"
    folder.mkdir()
    slides_of_ones_own(folder, shown_manifest, azure)
    sets_at_home(home / "data")
    save_model(home / "models/phikon")
    labelled_tiles(folder)
    weights(folder / "weights")
    checkout(folder)
    shell = {
        "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "AZURE_STORAGE_CONNECTION_STRING": connection_string(azure.url),
        "AZURITE": os.environ.get("AZURITE", ""), "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return World(folder, home, shell)


def checkout(folder: Path) -> None:
    """What up.py looks at in a clone, with the environment of these tests in place of one that it would make."""
    for name in ("pyproject.toml", "constraints.txt", "hubconf.py", "launch/up.py", *up.COMPILED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    made = folder / up.VENV.name
    (made / "bin").mkdir(parents=True)
    (made / "bin/python").symlink_to(sys.executable)
    (made / "lib").symlink_to(Path(sys.prefix) / "lib")
    if (Path(sys.prefix) / "pyvenv.cfg").exists():
        shutil.copyfile(Path(sys.prefix) / "pyvenv.cfg", made / "pyvenv.cfg")
    (made / "histoscale.stamp").write_text(up.stamp(ROOT / "constraints.txt"))


def slides_of_ones_own(folder: Path, shown: str, azure: Server) -> None:
    """manifest.csv begins with the rows of the README; slides.csv and more_slides.csv are parts of it. 20x and 40x, 3 sites."""
    rows = list(csv.DictReader(StringIO(shown)))
    for number in range(len(rows), PATIENTS):
        place = f"relative/to/the/manifest/S{number + 1:03d}.svs"
        rows.append({**rows[1], "slide_id": f"S{number + 1:03d}", "uri": place, "patient_id": f"P{number + 1:02d}"})
    for number, row in enumerate(rows):
        row |= {"site": SITES[number % 3], "tumour": str(number // 3 % 2), "her2": ("pos", "neg", "neg", "pos", "")[number % 5]}
        row |= {"grade": str(1 + number // 3 % 3)}
        local = folder / "relative/to/the/manifest" / f"{row['slide_id']}.svs"
        if number % 4 == 0:
            write_slide(local, mpp=0.25, pixels=of_tissue(2400, 2300, number))
        else:
            write_slide(local, mpp=0.5, pixels=of_tissue(1200, 1100, number))
        if row["uri"].startswith("az://"):
            container, name = row["uri"].removeprefix("az://").split("/", 1)
            upload(connection_string(azure.url), {name: local.read_bytes()}, container)
            local.unlink()
    write_rows(folder / "manifest.csv", rows)
    write_rows(folder / "slides.csv", rows[2:5])
    write_rows(folder / "more_slides.csv", rows[2:7])
    write_rows(folder / "shown.csv", list(csv.DictReader(StringIO(shown))))
    far = {"slides.csv": (folder / "shown.csv").read_bytes().replace(b"relative/to/the/manifest/", b"")}
    far |= {"S002.svs": (folder / "relative/to/the/manifest/S002.svs").read_bytes()}
    far |= {f"train-{number:03d}.tar": shard(number) for number in range(SHARDS)}
    upload(connection_string(azure.url), far, "container")


def shard(number: int) -> bytes:
    """A WebDataset shard with the tiles of one slide."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for tile in range(4):
            data = BytesIO()
            Image.fromarray(piece(4 * number + tile)).save(data, "png")
            member = tarfile.TarInfo(f"slide{number:03d}/{tile:05d}.png")
            member.size = len(data.getvalue())
            archive.addfile(member, BytesIO(data.getvalue()))
    return file.getvalue()


def sets_at_home(data: Path) -> None:
    """~/data: public sets and cohorts in the layouts of their authors; of Camelyon16 a few slides have tissue."""
    write_crc(data, each=6)
    write_pcam(data / "pcam", tiles=24)
    camelyon = write_camelyon16(data / "CAMELYON16")
    some = [f"training/normal/normal_{n:03d}.tif" for n in (*range(1, 8), *range(101, 108))]
    some += [f"training/tumor/tumor_{n:03d}.tif" for n in (*range(1, 8), *range(71, 78))]
    some += [f"testing/images/test_{n:03d}.tif" for n in range(1, 17)]
    for number, name in enumerate(some):
        mpp = 0.243 if "normal_0" in name or "tumor_00" in name or number % 5 < 3 else 0.227
        write_slide(camelyon / name, kind="generic", mpp=mpp, pixels=of_tissue(1200, 1100, 100 + number))
    write_panda(data / "panda", 60, noisy=True)
    names = {f"TCGA-{code}-A00{n}-01Z-00-DX1.svs": f"{code}{n}" for code, *_ in HOSPITALS for n in range(2)}
    write_tcga(data / "tcga", names, HOSPITALS)


def labelled_tiles(folder: Path) -> None:
    """tiles/: class folders; sites/ and camelyon/: labels.csv with sites and slides; plism/: registered tiles; lung.csv."""
    for name in ("normal", "tumour"):
        for number in range(12):
            tile(folder / "tiles" / name / f"{number:02d}.png", number + 100 * (name == "tumour"), name == "tumour")
    for place, slides in (("sites", 4), ("camelyon", 17)):
        rows: list[dict[str, object]] = []
        for site in ("north", "south"):
            for label in ("normal", "tumour"):
                for slide in range(slides):
                    who = f"{site}-{label}-{slide}"
                    for cut in range(2):
                        tile(folder / place / f"{who}-{cut}.png", len(rows), label == "tumour")
                        row = {"path": f"{who}-{cut}.png", "label": label, "site": site, "slide_id": who, "patient_id": who}
                        rows.append(dict(row))
        write_rows(folder / place / "labels.csv", rows)
    registered: list[dict[str, object]] = []
    for number in range(6):
        for scanner in ("one", "two"):
            name = f"{number}-{scanner}.png"
            tile(folder / "plism" / name, number, scanner == "two")
            registered.append({"path": name, "tile_id": f"T{number}", "scanner": scanner, "stain": "GIV"})
    write_rows(folder / "plism/registered.csv", registered)
    subtypes = [{"patient": f"TCGA-{code}-A00{n}", "subtype": study} for code, _, study in HOSPITALS for n in range(2)]
    write_rows(folder / "lung.csv", subtypes)


def tile(path: Path, seed: int, darker: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = piece(seed)
    Image.fromarray(pixels - pixels // 5 if darker else pixels).save(path)


@cache
def drawn(width: int, height: int) -> np.ndarray:
    return tissue_pixels(width, height, whole=True)


def of_tissue(width: int, height: int, number: int) -> np.ndarray:
    """A slide like no other: a block of tissue, large enough for a patch at 2 um/px, with a rim of glass. Drawing is slow, so it
    is one drawing, moved."""
    pixels = np.full((height, width, 3), 244, np.uint8)
    top, left = height // 10, width // 10
    moved = np.roll(drawn(width, height), (53 * number, 37 * number), (0, 1))
    pixels[top:-top, left:-left] = moved[top:-top, left:-left]
    return pixels


def piece(number: int) -> np.ndarray:
    """uint8 [64, 64, 3], all tissue, like no other below 1,000."""
    y, x = 31 * (number // 32), 31 * (number % 32)
    return drawn(1200, 1100)[y : y + 64, x : x + 64]


def save_model(folder: Path) -> None:
    """A vision transformer as transformers saves it, next to no weights."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def weights(folder: Path) -> None:
    """What start.weights= names, with timm's names: of the architectures of the recipes that the examples start from."""
    folder.mkdir()
    torch.manual_seed(0)
    for name, architecture, size in (("model", "vit_small_patch14_reg4_dinov2", 518), ("dino", "vit_small_patch16_224", 224)):
        made = timm.create_model(architecture, img_size=size, num_classes=0)
        save_file(made.state_dict(), folder / f"{name}.safetensors")
