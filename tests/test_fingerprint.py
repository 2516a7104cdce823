"""Results never outlive their inputs: every byte that a command reads is part of what its result is known by."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from histoscale.data import fingerprint
from histoscale.data.keys import key
from histoscale.data.storage import Store
from histoscale.launch.config import load
from histoscale.launch.run import Refused, asked_of, invoke

QUIET = "logging.progress=off"
GRID = ["grid.mpp=1.0", "grid.patch_px=64"]


def flip(path: Path, place: int) -> None:
    """Another byte, while size and time of change stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place % before.st_size)
        (old,) = file.read(1)
        file.seek(place % before.st_size)
        file.write(bytes([old ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cohort, its catalog and stores, a release, labelled tiles, and two finished probes."""
    root = tmp_path_factory.mktemp("world")
    _release(root / "release")
    _tiles(root / "tiles")
    invoke("cohort", ["cohort=tiny", "cohort.cases=2", f"out={root / 'cohort'}", QUIET])
    invoke("index", [f"manifest={root / 'cohort/manifest.csv'}", "tissue.close_um=48", f"out={root / 'catalog'}", QUIET])
    for name, more in (("embeddings", ["jitter.copies=1"]), ("colour", [])):
        invoke("embed", ["encoder=colour", f"catalog={root / 'catalog'}", *GRID, *more, f"out={root / name}", QUIET])
    for name in ("one", "two"):
        shutil.copytree(root / "release", root / name)
        flip(root / name / "model.safetensors", -1 if name == "one" else -2)
        invoke("probe", [*overrides("probe", root), f"encoder={root / name}", f"out={root / 'runs' / name}"])
    return root


def _release(folder: Path) -> None:
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    folder.mkdir()
    save_file(timm.create_model("vit_tiny_patch16_224", **args).state_dict(), folder / "model.safetensors")
    data = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "num_features": 24, "model_args": args, "pretrained_cfg": data}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "MODEL.json").write_text(json.dumps({"mpp": {"trained_at": [0.5, 1.0]}}))


def _tiles(folder: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    (folder / "img").mkdir(parents=True)
    for i in range(48):
        pixels = rng.normal(150 + 40 * (i % 2), 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"img/{i}.png")
        split, site = ("train", "north") if i < 24 else ("test", "south")
        rows.append({"path": f"img/{i}.png", "label": "dark light".split()[i % 2], "split": split, "patient_id": f"P{i // 2}",
                     "site": site, "slide_id": f"s{i // 2}"})  # fmt: skip
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def overrides(command: str, root: Path) -> list[str]:
    cohort, catalog, release = root / "cohort", f"catalog={root / 'catalog'}", f"encoder={root / 'release'}"
    labelled = ["dataset=folder", f"data_root={root / 'tiles'}", "hardware.device=cpu", "precision=fp32", QUIET]
    return {
        "mil": [f"embeddings={root / 'embeddings'}", "copies=1", f"floor_embeddings={root / 'colour'}", catalog, QUIET,
                f"manifest={cohort / 'manifest.csv'}", f"annotations={cohort / 'truth'}", f"pretraining={root / 'catalog'}"],
        "probe": [release, *labelled, "honest.probes=[knn]", "floors.initialisations=1", "floors.trees=5",
                  "scoring.interval.draws=50"],
        "robustness": [release, *labelled, "measures=[index]", "normalisations=[none]"],
        "compare": [f"runs=[{root / 'runs/one'},{root / 'runs/two'}]", QUIET],
        "embed": [release, catalog, *GRID, "precision=fp32", QUIET],
    }[command]  # fmt: skip


def inputs(command: str, root: Path) -> list[Path]:
    """Every file that the command reads, found without its help."""
    def below(*patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file() and path.stat().st_size]

    release, catalog, tiles = below("release/*"), below("catalog/catalog.json", "catalog/data-*/*"), below("tiles/**/*")
    cases = {row["slide_id"] for row in csv.DictReader((root / "cohort/manifest.csv").open()) if row["tumour"]}
    stores = [path for path in below("embeddings/**/*.h5", "colour/*.h5") if path.stem in cases]
    drawn = below("cohort/truth/*/foci.geojson", "cohort/slides/*")
    return {
        "mil": [*stores, *catalog, *below("cohort/manifest.csv"), *(p for p in drawn if {p.stem, p.parent.name} & cases)],
        "probe": [*release, *tiles],
        "robustness": [*release, *tiles],
        "compare": below("runs/*/predictions.npz"),
        "embed": [*release, *catalog],
    }[command]  # fmt: skip


def asking(command: str, root: Path) -> Callable[[], str]:
    """Each call says what its result is known by, or why it refuses."""
    composed = load(command, [*overrides(command, root), f"out={root / 'none'}"])

    def ask() -> str:
        try:
            return asked_of(command, composed, root / "none").identity
        except (ValueError, OSError) as error:
            return f"refused: {error}"

    return ask


def identity(command: str, root: Path) -> str:
    return asking(command, root)()


def told_apart(paths: list[Path]) -> list[Path]:
    """All of them, but of the slides' files, which one loop reads folder by folder, the first, middle and last of each."""
    folders: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        folders.setdefault((path.parent.parent if path.suffix == ".geojson" else path.parent, path.suffix), []).append(path)
    return [path for (_, suffix), same in folders.items() for i, path in enumerate(same)
            if suffix not in (".h5", ".svs", ".geojson") or i in (0, len(same) // 2, len(same) - 1)]  # fmt: skip


@pytest.mark.parametrize("command", ["mil", "probe", "robustness", "compare", "embed"])
def test_a_byte_of_any_input_is_another_result(world: Path, command: str) -> None:
    """Of each of them one, at a place that its name draws."""
    ask, paths = asking(command, world), told_apart(inputs(command, world))
    before, kept = ask(), []
    for path in paths:
        place = key(0, path.relative_to(world).as_posix()) % (1 << 20)
        flip(path, place)
        kept += [path] if ask() == before else []
        flip(path, place)
    assert not before.startswith("refused") and paths and kept == []
    assert ask() == before


@pytest.mark.parametrize("command", ["mil", "probe", "robustness", "compare", "embed"])
def test_what_was_touched_or_copied_elsewhere_is_the_same(world: Path, tmp_path: Path, command: str) -> None:
    before = identity(command, world)
    for path in inputs(command, world):
        path.touch()
    assert identity(command, world) == before
    copied = tmp_path / world.name
    shutil.copytree(world, copied, copy_function=shutil.copyfile)
    if command != "mil":  # the slides' places stand in the catalog, which is copied as it is
        shutil.rmtree(copied / "cohort")
    assert identity(command, copied) == before


def test_noise_in_place_of_features_does_not_keep_their_numbers(world: Path, tmp_path: Path) -> None:
    import h5py

    stores, out = tmp_path / "embeddings", tmp_path / "mil"
    shutil.copytree(world / "embeddings", stores)
    composed = load("mil", [f"embeddings={stores}", f"manifest={world / 'cohort/manifest.csv'}", f"out={out}"])
    asked = asked_of("mil", composed, out)
    path = sorted(name for name in asked.noted.files if name.endswith(".h5"))[0]
    with h5py.File(path, "r+") as file:
        file["features"][...] = np.random.default_rng(0).normal(size=file["features"].shape)
    after = asked_of("mil", composed, out)
    assert fingerprint.differences(asked.files, after.files) == [f"embeddings/{Path(path).name} has changed"]


def test_a_refusal_names_the_file_and_what_to_type(world: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(world / "runs", runs)
    keys = [f"runs=[{runs / 'one'},{runs / 'two'}]", QUIET, f"out={tmp_path / 'compare'}"]
    invoke("compare", keys)
    shutil.copy(runs / "one/predictions.npz", runs / "two/predictions.npz")
    with pytest.raises(Refused, match=r"runs.1/predictions.npz has changed.*compare-[0-9a-f]{8}, or bring the old"):
        invoke("compare", keys)
    shutil.rmtree(runs)
    with pytest.raises(ValueError, match="a finished result of these keys, which stays, but its inputs cannot be looked at"):
        invoke("compare", keys)


def test_a_store_of_a_replaced_slide_is_made_again(world: Path, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    shutil.copytree(world / "cohort", cohort)
    catalog, out = tmp_path / "catalog", tmp_path / "out"
    index = [f"manifest={cohort / 'manifest.csv'}", "tissue.close_um=48", f"out={catalog}", QUIET]
    embed = ["encoder=colour", f"catalog={catalog}", *GRID, f"out={out}", QUIET]
    invoke("index", index)
    count = invoke("embed", embed)["embed"]["slides"]
    assert invoke("embed", embed)["embed"]["kept"] == count
    slides = sorted((cohort / "slides").glob("*.svs"))
    for path in slides:
        path.touch()
    assert invoke("embed", embed)["embed"]["kept"] == count
    before = {path.name: path.read_bytes() for path in out.glob("*.h5")}
    with slides[0].open("r+b") as file:  # a tile of level 0, so that the tile table stays as it is
        file.seek(2000)
        file.write(bytes(64))
    gone = invoke("embed", embed)["embed"]
    assert list(gone["failed"]) == [slides[0].stem] and "not the file that was indexed" in gone["failed"][slides[0].stem]
    assert not (out / f"{slides[0].stem}.h5").exists()
    invoke("index", index)
    again = invoke("embed", embed)["embed"]
    assert again["kept"] == count - 1 and again["slides"] == count
    assert sum((out / name).read_bytes() != data for name, data in before.items()) == 1


def test_a_rested_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, listed = tmp_path / "a", tmp_path / "list"
    path.write_bytes(b"one")
    monkeypatch.setattr(fingerprint, "_RESTED_NS", -(1 << 62))  # as if it had rested
    with fingerprint.noting() as noted:
        found = fingerprint.content(path)
    fingerprint.save(listed, {"key": found}, noted)
    fingerprint._known.clear()
    assert fingerprint.load(listed) == {"key": found}
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint.hashlib, "file_digest", None)  # it would be needed
        assert fingerprint.content(path) == found
    flip(path, 0)  # as long, as old; ctime tells
    assert fingerprint.content(path) != found


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    fingerprint.content(path)
    assert str(path) not in fingerprint._known


# What OpenSlide opens is one file; the pixels lie in others.
SLIDES = {
    "slide.mrxs": {"slide.mrxs": b"stub", "slide/Slidedat.ini": b"index", "slide/Data0001.dat": b"pixels"},
    "slide.vms": {"slide.vms": b"[x]\nImageFile=a.jpg\nMapFile=map.jpg\nOptimisationFile=none.opt\n", "a.jpg": b"pixels",
                  "map.jpg": b"map"},
    "slide.dcm": {"slide.dcm": b"level 0", "other.DCM": b"level 1"},
    "slide.svs": {"slide.svs": b"all"},
}  # fmt: skip


@pytest.mark.parametrize("name", SLIDES)
def test_a_byte_of_any_file_of_a_slide_is_another_slide(tmp_path: Path, store: Store, name: str) -> None:
    for below, data in {**SLIDES[name], "notes.txt": b"no part of it"}.items():
        (tmp_path / below).parent.mkdir(exist_ok=True)
        (tmp_path / below).write_bytes(data)
    before = fingerprint.slide_bytes(str(tmp_path / name), store)
    flip(tmp_path / "notes.txt", 0)
    for below in SLIDES[name]:
        assert fingerprint.slide_bytes(str(tmp_path / name), store) == before
        flip(tmp_path / below, -1)
        assert fingerprint.slide_bytes(str(tmp_path / name), store) != before, below
        flip(tmp_path / below, -1)


@pytest.mark.parametrize("name", SLIDES)
def test_and_in_a_store(store: Store, name: str) -> None:
    """By the mark that a store gives each file when it is written; what belongs to a slide is copied with it."""
    files = fsspec.filesystem("memory")
    for below, data in SLIDES[name].items():
        files.pipe_file(f"/marks/{below}", data)
    uri = f"memory://marks/{name}"
    before = fingerprint.slide_bytes(uri, store)
    for below, data in SLIDES[name].items():
        assert (store.local(uri).parent / below).read_bytes() == data
        assert fingerprint.slide_bytes(uri, store) == before
        files.pipe_file(f"/marks/{below}", data + b"!")
        assert fingerprint.slide_bytes(uri, store) != before, below
        files.pipe_file(f"/marks/{below}", data)
        before = fingerprint.slide_bytes(uri, store)
    files.rm("/marks", recursive=True)


def test_of_a_large_slide_its_time_of_change_counts(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SLIDE", 1 << 17)
    small, large = tmp_path / "small.svs", tmp_path / "large.svs"
    small.write_bytes(bytes(1 << 17))
    large.write_bytes(bytes((1 << 17) + 1))
    before = [fingerprint.slide_bytes(str(path), store) for path in (small, large)]
    stat = large.stat()
    flip(large, 5000)  # between the blocks that a sketch reads
    for path in (small, large):
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = [fingerprint.slide_bytes(str(path), store) for path in (small, large)]
    assert after[0] == before[0] and after[1] != before[1]
    copied = shutil.copy2(large, tmp_path / "copied.svs")
    assert fingerprint.slide_bytes(str(copied), store) == after[1]


_PLACES = st.text("ab/", min_size=1, max_size=8).map(lambda text: os.path.normpath(f"/{text.lstrip('/')}"))


@given(st.dictionaries(_PLACES, st.text("xy"), max_size=6))
def test_names_depend_on_the_keys_alone(files: dict[str, str]) -> None:
    """Wherever a folder lies, its files have the same names, and no two files are lost in one."""
    here = {f"/here{path}".rstrip("/"): value for path, value in files.items()}
    there = {f"/far/away{path}".rstrip("/"): value for path, value in files.items()}
    named = fingerprint.by_key(here, {"data_root": "/here", "out": "/elsewhere"})
    assert named == fingerprint.by_key(there, {"data_root": "/far/away"}) and len(named) == len(here)
