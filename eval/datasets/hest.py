"""HEST-Bench: 50 genes a task, predicted from 112 µm patches around spots (arXiv 2406.16192)."""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import sparse

from histoscale.data.fingerprint import content, contents
from histoscale.data.jsonfiles import read_object
from histoscale.data.names import known, tidy
from histoscale.eval.datasets.patches import DatasetError, Reading, hash_of
from histoscale.eval.datasets.public import PublicConfig, wants_official
from histoscale.eval.datasets.spots import LabelledSpots, check_splits
from histoscale.eval.hdf5 import Hdf5Error, array, attributes, check_written, group

AVERAGED = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "LUNG", "LYMPH_IDC")
TASKS = (*AVERAGED, "HCC")  # the tenth is in the data and not in the published table
GENES, GENE_COUNT = "var_50genes.json", 50
COLUMNS = ("sample_id", "patches_path", "expr_path")
MPP, SIDE = 0.5, 224
IMAGES, BARCODES = ("img", "imgs", "images"), ("barcode", "barcodes")  # as HEST writes and wrote them
METADATA, METADATA_COLUMNS = "HEST_v*.csv", ("id", "patient", "dataset_title")
LAYOUT = "<TASK>/splits/{train,test}_<i>.csv, <TASK>/var_50genes.json, <TASK>/patches/<id>.h5 and <TASK>/adata/<id>.h5ad"
_SHOWN = 6  # names that an error lists
_SPLIT = re.compile(r"(train|test)_(\d+)\.csv")


@dataclass(frozen=True)
class HestConfig(PublicConfig):
    """task: one of TASKS; null for the nine that are averaged, of which `counts=any` takes those that are there."""

    task: str | None


def open_hest(root: Path, config: HestConfig) -> list[LabelledSpots]:
    """The tasks that dataset.task names; null: the nine that are averaged (counts=any: those of them that are there).

    root: the folder of the tasks; `HEST_v*.csv` in it, the metadata of HEST-1k, says whose the samples are.
    Raises DatasetError: a task, a file, a key or a gene is missing, a spot has no expression, a sample or patient on both sides.
    """
    if config.task not in (None, *TASKS) or config.mpp != MPP:
        raise DatasetError(
            f"dataset.task is {config.task!r} and dataset.mpp {config.mpp}: expected null or one of {', '.join(TASKS)}, and {MPP}"
        )
    there = [task for task in AVERAGED if (root / task).is_dir()]
    tasks = [config.task] if config.task is not None else list(AVERAGED) if wants_official(config) else there
    missing = [task for task in tasks if not (root / task).is_dir()]
    if missing or not tasks:
        raise DatasetError(
            f"{root} lacks the task {', '.join(missing) or 'folders'}: expected {LAYOUT}, fetch them, or name one with "
            "dataset.task="
        )
    return [open_task(root, task, _patients(root), config) for task in tasks]


def open_task(root: Path, task: str, patients: dict[str, str] | None, config: HestConfig) -> LabelledSpots:
    """One task: samples by id, spots in the order of their patch files. patients: sample -> patient, or None where unknown."""
    folder = root / task
    splits, files = _splits(folder)
    genes = _genes(folder / GENES)
    samples = sorted(files)
    unknown = [sample for sample in samples if patients is not None and sample not in patients]
    if unknown:
        raise DatasetError(
            f"the metadata in {root} lacks the sample {unknown[0]} of {task}: expected every sample, fetch it again"
        )
    counts, targets = [], []
    for sample in samples:
        patches, expression = files[sample]
        barcodes = _barcodes(patches)
        targets.append(np.log1p(_expression(expression, genes, barcodes)))
        counts.append(len(barcodes))
    read = contents([path for sample in samples for path in files[sample]])
    slide_ids = np.repeat(samples, counts)
    owners = slide_ids if patients is None else np.array([patients[sample] for sample in slide_ids])
    notes = () if patients is not None else (f"no {METADATA} in data_root, so intervals resample samples and not patients",)
    absent = [other for other in AVERAGED if not (root / other).is_dir()] if config.task is None else []
    if absent:
        notes = (*notes, f"dataset.counts=any: the average is withheld, without {', '.join(absent)}")
    spots = LabelledSpots(
        name=f"hest/{task}",
        genes=genes,
        targets=np.concatenate(targets),
        patients=owners,
        slide_ids=slide_ids,
        groups="slide" if patients is None else "patient",
        splits=splits,
        mpp=MPP,
        size_px=SIDE,
        hash=hash_of("hest", task, samples, read, genes, np.concatenate(targets)),
        read=_reading([files[sample][0] for sample in samples], counts),
        notes=notes,
    )
    check_splits(spots)
    return spots


Splits = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


def _splits(folder: Path) -> tuple[Splits, dict[str, tuple[Path, Path]]]:
    """The splits in order, and each sample's patch and expression file."""
    found: dict[tuple[str, int], list[str]] = {}
    files: dict[str, tuple[Path, Path]] = {}
    for path in sorted((folder / "splits").glob("*.csv")) if (folder / "splits").is_dir() else []:
        match = _SPLIT.fullmatch(path.name)
        if match is None:
            raise DatasetError(f"{path} is no split: expected train_<i>.csv and test_<i>.csv there, move it away")
        rows = _csv(path, COLUMNS)
        found[match[1], int(match[2])] = [row["sample_id"] for row in rows]
        for row in rows:
            pair = (_inside(folder, row["patches_path"], path), _inside(folder, row["expr_path"], path))
            if files.setdefault(row["sample_id"], pair) != pair:
                raise DatasetError(
                    f"{path} gives other files for {row['sample_id']} than another split: expected one, fetch the splits again"
                )
    count = len(found) // 2
    wanted = {(side, number) for side in ("train", "test") for number in range(count)}
    if not found or set(found) != wanted:
        listed = ", ".join(f"{side}_{number}" for side, number in sorted(found)) or "none"
        raise DatasetError(
            f"{folder / 'splits'} has {listed}: expected train_<i>.csv and test_<i>.csv for i from 0 on, fetch them again"
        )
    return tuple((tuple(found["train", i]), tuple(found["test", i])) for i in range(count)), files


def _inside(folder: Path, name: str, listed: Path) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"{listed}: the path {name!r} leaves {folder}: expected one inside, fetch the splits again")
    if not path.is_file():
        raise DatasetError(f"{listed}: {path} is missing: expected {LAYOUT}, fetch it")
    return path


def _genes(path: Path) -> tuple[str, ...]:
    try:
        content(path)
        genes = read_object(path)["genes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} cannot be read ({error!r}): expected {{'genes': […]}}, fetch it again") from error
    if not isinstance(genes, list) or len(set(map(str, genes))) != GENE_COUNT or len(genes) != GENE_COUNT:
        size = len(genes) if isinstance(genes, list) else type(genes).__name__
        raise DatasetError(f"{path} has {size} genes: expected {GENE_COUNT} different ones, fetch it again")
    return tuple(str(gene) for gene in genes)


def _patients(root: Path) -> dict[str, str] | None:
    """Sample -> patient by the metadata of HEST-1k; patients are numbered inside a study. None without such a file."""
    paths = sorted(root.glob(METADATA))
    if not paths:
        return None
    if len(paths) > 1:
        raise DatasetError(
            f"{root} holds {', '.join(path.name for path in paths)}: expected one metadata file, remove the others"
        )
    rows = _csv(paths[0], METADATA_COLUMNS)
    # A sample without a patient is taken as its own: nobody can say more.
    return {row["id"]: f"{row['dataset_title']}/{tidy(row['patient'])}" if known(row["patient"]) else row["id"] for row in rows}


def _csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    content(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = sorted(set(columns) - set(reader.fieldnames or ()))
        if missing:
            raise DatasetError(f"{path} lacks the columns {', '.join(missing)}: expected {', '.join(columns)}, fetch it again")
        return [{name: row[name] or "" for name in columns} for row in reader]


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open to read; what is wrong with the file becomes a DatasetError that names it."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} is no HDF5 file ({error}): expected one, fetch it again") from error
    try:
        with file:
            yield file
    except (Hdf5Error, OSError, RuntimeError, KeyError) as error:
        why = error if isinstance(error, Hdf5Error) else f"cannot be read ({error})"
        raise DatasetError(f"{path} {why}: fetch it again") from error


def _key(file: h5py.File, names: tuple[str, ...], path: Path) -> str:
    name = next((name for name in names if file.get(name, getlink=True) is not None), None)
    if name is None:
        held = ", ".join(islice(file, _SHOWN))
        raise DatasetError(f"{path} has the keys {held}: expected {' or '.join(names)}, fetch it again")
    return name


def _whole(group: h5py.Group, name: str, kinds: str) -> np.ndarray:
    """All of a data set."""
    data = array(group, name, kinds)
    check_written(data, name)
    return data[()]


def _barcodes(path: Path) -> list[str]:
    """The barcode of every patch. Raises DatasetError for patches of another shape, or not one barcode each."""
    with _open(path) as file:
        images = array(file, _key(file, IMAGES, path), "iuf")
        check_written(images, "img")
        if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
            raise DatasetError(
                f"{path} has patches {images.dtype} {list(images.shape[1:])}: expected uint8 [{SIDE}, {SIDE}, 3], fetch it again"
            )
        barcodes = _texts(_whole(file, _key(file, BARCODES, path), "S"))
        if len(barcodes) != len(images) or len(set(barcodes)) != len(barcodes):
            raise DatasetError(
                f"{path} has {len(images)} patches and {len(set(barcodes))} different barcodes: expected one barcode a patch, "
                "fetch it again"
            )
        return barcodes


def _reading(paths: list[Path], counts: list[int]) -> Reading:
    starts = np.concatenate([[0], np.cumsum(counts)])

    def read(rows: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(rows), 3, SIDE, SIDE), np.uint8)
        owner = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(owner):
            at = np.flatnonzero(owner == number)
            inside, back = np.unique(rows[at] - starts[number], return_inverse=True)  # HDF5 reads increasing places
            with _open(paths[number]) as file:
                held = array(file, _key(file, IMAGES, paths[number]), "u")[inside]
            pixels[at] = held[back].transpose(0, 3, 1, 2)
        return pixels

    return read


def _expression(path: Path, genes: tuple[str, ...], barcodes: list[str]) -> np.ndarray:
    """Raw counts of the genes at the barcodes, float64 [n, G], from AnnData's file format (dense, CSR or CSC)."""
    with _open(path) as file:
        names = [_index(file, axis, path) for axis in ("obs", "var")]
        spots, columns = ({name: place for place, name in enumerate(each)} for each in names)
        absent = [barcode for barcode in barcodes if barcode not in spots]
        if absent:
            raise DatasetError(
                f"{path} has no expression for {len(absent)} of {len(barcodes)} patches ({absent[0]}): expected all, fetch "
                "both files again"
            )
        lacking = [gene for gene in genes if gene not in columns]
        if lacking:
            raise DatasetError(f"{path} lacks the genes {', '.join(lacking[:4])}: expected those of {GENES}, fetch it again")
        rows = np.array([spots[barcode] for barcode in barcodes])
        counts = _matrix(file, path, (len(names[0]), len(names[1])))[:, [columns[gene] for gene in genes]][rows]
    values = counts.toarray() if sparse.issparse(counts) else np.asarray(counts)
    values = values.astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise DatasetError(f"{path} has counts that are negative or not finite: expected raw counts in X, fetch it again")
    return values


def _index(file: h5py.File, axis: str, path: Path) -> list[str]:
    """The names along an axis: the column that the attribute `_index` of the group names."""
    held = group(file, axis)
    name = attributes(held, ("_index",)).get("_index")
    if name is None:
        raise DatasetError(f"{path} has no index of {axis}: expected a file of anndata 0.7 or newer, write it again with that")
    return _texts(_whole(held, str(name), "S"))


def _matrix(file: h5py.File, path: Path, shape: tuple[int, int]) -> Any:
    """X of that shape [spots, genes]: a dense array, or a scipy matrix that can be sliced by columns."""
    if file.get("X", getclass=True, getlink=True) is h5py.HardLink and isinstance(file["X"], h5py.Dataset):
        return _whole(file, "X", "iuf")
    held = group(file, "X")
    kind = attributes(held, ("encoding-type",)).get("encoding-type")
    forms = {"csr_matrix": sparse.csr_matrix, "csc_matrix": sparse.csc_matrix}
    if kind not in forms:
        raise DatasetError(f"{path} has X as {kind}: expected a dense array, csr_matrix or csc_matrix, write it again")
    parts = (_whole(held, "data", "iuf"), _whole(held, "indices", "iu"), _whole(held, "indptr", "iu"))
    try:
        found = forms[str(kind)](parts, shape=shape)
        found.check_format(full_check=True)  # a place outside would be written to
    except ValueError as error:
        raise DatasetError(f"{path} has an X that is no matrix of {list(shape)} ({error}): fetch it again") from error
    return found.tocsc()


def _texts(values: np.ndarray) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in np.asarray(values).reshape(-1)]
