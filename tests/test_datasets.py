"""Labelled patches: the right pixels with the right labels, and no patient or site on two sides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.datasets.cohort import CutConfig, open_cohort
from histoscale.eval.datasets.patches import DatasetConfig, DatasetError

CONFIG = DatasetConfig(name="cohort", task=None, train="train", report="test", external="external", mpp=None)
CUT = CutConfig(mpp_tolerance=0.05, max_upsample=1.0, threads=2)
ROLES = {"a": "train", "b": "test", "c": "external"}


@pytest.fixture
def catalog(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> Catalog:
    """Three slides of lossless tissue at 0.5 mpp."""
    for seed, name in enumerate(ROLES):
        make_slide(tmp_path / f"{name}.tif", compression="deflate", kind="generic", seed=seed)
    (tmp_path / "manifest.csv").write_text("slide_id,uri\n" + "".join(f"{name},{name}.tif\n" for name in ROLES))
    slides = read_manifest(str(tmp_path / "manifest.csv"), store)
    return build_catalog(slides, store, tissue_config, tmp_path / "catalog", 0, None, journal)


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Four patches a slide, two classes, not in the order of reading."""
    found = []
    for i in range(12):
        name = "abc"[i % 3]
        row = {"slide_id": name, "patient_id": f"P{name}", "site": f"S{name}", "role": ROLES[name], "task": "t",
               "x": 300 + 37 * i, "y": 500 - 31 * i, "mpp": 0.5, "size_px": 48, "label": "uv"[i // 3 % 2]}  # fmt: skip
        found.append({**row, **changes} if i == 0 else row)
    return found


def table(tmp_path: Path, found: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "patches.parquet")
    return str(tmp_path / "patches.parquet")


def test_patches_are_the_pixels_at_their_place(
    tmp_path: Path, catalog: Catalog, store: Store, draw_tissue: Callable[..., Any]
) -> None:
    patches = open_cohort(table(tmp_path, rows()), catalog, store, CONFIG, CUT)
    full = {name: draw_tissue(1100, 900, seed) for seed, name in enumerate(ROLES)}
    listed = sorted(rows(), key=lambda row: (row["slide_id"], row["y"], row["x"]))
    seen = 0
    for batch, pixels in patches.batches(5):
        assert pixels.shape == (len(batch), 3, 48, 48) and pixels.dtype == np.uint8
        for i, patch in zip(batch, pixels, strict=True):
            row = listed[i]
            expected = full[row["slide_id"]][row["y"] : row["y"] + 48, row["x"] : row["x"] + 48]
            assert (patch.transpose(1, 2, 0) == expected).all()
            assert patches.classes[patches.labels[i]] == row["label"] and patches.patients[i] == row["patient_id"]
            assert patches.roles[i] == {"train": "train", "test": "report", "external": "external"}[row["role"]]
            seen += 1
    assert seen == 12
    part = patches.only(patches.rows("external"))
    assert len(part) == 4 and (part.read(np.arange(4)) == patches.read(patches.rows("external"))).all()


def test_a_coarser_mpp_is_resampled_and_is_other_data(tmp_path: Path, catalog: Catalog, store: Store) -> None:
    fine = open_cohort(table(tmp_path, rows()), catalog, store, CONFIG, CUT)
    coarse = open_cohort(table(tmp_path, [{**row, "mpp": 1.0} for row in rows()]), catalog, store, CONFIG, CUT)
    assert coarse.hash != fine.hash and coarse.mpp == 1.0
    assert abs(coarse.read(np.arange(12)).mean() - fine.read(np.arange(12)).mean()) < 40
    unserved = open_cohort(table(tmp_path, [{**row, "mpp": 0.2} for row in rows()]), catalog, store, CONFIG, CUT)
    with pytest.raises(DatasetError, match="can serve 0.2"):
        unserved.read(np.arange(12))


@pytest.mark.parametrize("changes, words", [
    ({"patient_id": "Pb"}, "1 patients stand in both train and report"),
    ({"site": "Sc"}, "the sites Sc have both external"),
    ({"slide_id": "z"}, "1 slides that the catalog does not hold: z"),
    ({"label": "w", "role": "test", "patient_id": "Pb"}, "the class 'w' has no training patch"),
    ({"mpp": 1.0}, "mixes mpp"),
    ({"task": "other"}, "name one with dataset.task="),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, catalog: Catalog, store: Store, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DatasetError, match=words):
        open_cohort(table(tmp_path, rows(**changes)), catalog, store, CONFIG, CUT)


def test_a_table_without_its_columns_is_refused(tmp_path: Path, catalog: Catalog, store: Store) -> None:
    with pytest.raises(DatasetError, match="lacks the columns label"):
        uri = table(tmp_path, [{k: v for k, v in row.items() if k != "label"} for row in rows()])
        open_cohort(uri, catalog, store, CONFIG, CUT)
    with pytest.raises(DatasetError, match="three different roles"):
        same = DatasetConfig("cohort", None, "train", "test", "test", None)
        open_cohort(table(tmp_path, rows()), catalog, store, same, CUT)
    (tmp_path / "patches.parquet").write_text("no")
    with pytest.raises(DatasetError, match="not a Parquet file"):
        open_cohort(str(tmp_path / "patches.parquet"), catalog, store, CONFIG, CUT)


@pytest.mark.parametrize("changes, words", [
    ({"patient_id": None}, "1 of 12 patches have no patient_id"),
    ({"patient_id": "nan"}, "1 of 12 patches have no patient_id"),
    ({"label": "N/A"}, "1 of 12 patches have no label"),
    ({"patient_id": "pB "}, "1 patients stand in both train and report"),
    ({"site": "sc"}, "have both external"),
    ({"slide_id": "a1"}, "does not hold: a1; the nearest to a1 is a: is that the one?"),
])  # fmt: skip
def test_no_spelling_hides_what_is_missing_or_shared(
    tmp_path: Path, catalog: Catalog, store: Store, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DatasetError) as error:
        open_cohort(table(tmp_path, rows(**changes)), catalog, store, CONFIG, CUT)
    assert words in str(error.value)


def test_slide_ids_may_have_gained_a_suffix_or_a_folder(tmp_path: Path, catalog: Catalog, store: Store) -> None:
    plain = open_cohort(table(tmp_path, rows()), catalog, store, CONFIG, CUT)
    names = {"a": "a.svs", "b": "scans/B.tif", "c": "c"}
    written = [{**row, "slide_id": names[row["slide_id"]], "role": f"{row['role'].upper()} "} for row in rows()]
    found = open_cohort(table(tmp_path, written), catalog, store, CONFIG, CUT)
    for role in ("train", "report", "external"):
        mine, theirs = (np.sort(p.read(p.rows(role)).reshape(-1)) for p in (plain, found))
        assert np.array_equal(mine, theirs)
