"""TP53 from TCGA: labels from variants, tiles by hash, hospitals whole, and the way from slides to patches."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_layouts import pin, tp53_config, write_hospitals, write_study
from slide_fixtures import tissue_pixels, write_slide

from histoscale.data.catalog import Catalog
from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.keys import key
from histoscale.data.manifest import read_manifest
from histoscale.data.splits import name_key
from histoscale.data.storage import StorageConfig, Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.datasets import tp53
from histoscale.eval.datasets.cohort import CutConfig
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.datasets.tcga import (
    check_pinned,
    hospital_folds,
    hospital_of,
    is_diagnostic,
    patient_of,
    read_hospitals,
    read_sequenced,
    tp53_labels,
)
from histoscale.eval.datasets.tp53 import keyed_tiles, open_tp53, tissue_tiles

CUT = CutConfig(mpp_tolerance=0.05, max_upsample=1.0, threads=1)
SITE = tp53_config(counts="any")
REF = tp53_config(counts="any", split="ref")
HOSPITALS = {"A1": "Alpha", "A2": "Alpha", "B1": "Beta", "B2": "Beta", "C1": "Gamma", "D1": "Delta", "E1": "Epsilon"}


def variant(kind: str, sample: str, gene: str = "TP53") -> dict[str, str]:
    return {"Hugo_Symbol": gene, "Variant_Classification": kind, "Tumor_Sample_Barcode": sample}


def test_labels_follow_the_stated_classes_of_variant() -> None:
    changing = (
        "Missense_Mutation", "Nonsense_Mutation", "Frame_Shift_Del", "Frame_Shift_Ins", "In_Frame_Del", "In_Frame_Ins",
        "Splice_Site", "Translation_Start_Site", "Nonstop_Mutation",
    )  # fmt: skip
    rows = [variant(kind, f"TCGA-AA-000{i}-01") for i, kind in enumerate(changing)]
    rows += [variant("Silent", "TCGA-AB-0001-01"), variant("Splice_Region", "TCGA-AB-0002-01")]
    rows += [variant("Intron", "TCGA-AB-0004-01")]
    rows += [variant("Missense_Mutation", "TCGA-AB-0003-01", "KRAS")]
    sequenced = [f"TCGA-AB-000{i}-01" for i in (1, 2, 3)] + ["TCGA-AA-0000-01", "TCGA-AA-0000-06"]
    labels = tp53_labels(rows, sequenced)
    # A variant makes a patient positive even outside the list; a silent one outside the list makes nobody negative.
    assert labels == {**{f"TCGA-AA-000{i}": 1 for i in range(9)}, **{f"TCGA-AB-000{i}": 0 for i in (1, 2, 3)}}
    with pytest.raises(DatasetError, match="of the class 'Missense': expected a Variant_Classification"):
        tp53_labels([variant("Missense", "TCGA-AA-0001-01")], [])
    with pytest.raises(DatasetError, match="'P-0001' is no TCGA barcode"):
        tp53_labels([], ["P-0001"])


def test_barcodes() -> None:
    assert patient_of("TCGA-83-5908-01Z-00-DX1.381c8f82") == "TCGA-83-5908"
    assert is_diagnostic("TCGA-83-5908-01Z-00-DX1.381c8f82-61a0") and is_diagnostic("TCGA-83-5908-01Z-00-DX2")
    assert not is_diagnostic("TCGA-83-5908-01A-01-TS1.381c8f82-61a0") and not is_diagnostic("CMU-1")
    with pytest.raises(DatasetError, match="is no TCGA barcode"):
        patient_of("TCGA-83-59081")


def test_the_table_of_hospitals(tmp_path: Path) -> None:
    path = tmp_path / "tissueSourceSite.tsv"
    write_hospitals(tmp_path, {**HOSPITALS, "01": "International  Genomics Consortium "})
    found = read_hospitals(path)
    assert found["A1"] == found["A2"] == "Alpha" and found["01"] == "International Genomics Consortium"
    with pytest.raises(DatasetError, match="lacks the source-site code 'ZZ' of TCGA-ZZ-0001"):
        hospital_of("TCGA-ZZ-0001", found)
    wrong = (({"1": "IGC"}, "spreadsheets drop leading zeros"), ({"A1": ""}, "expected two characters and a name"))
    for hospitals, words in wrong:
        write_hospitals(tmp_path, hospitals)
        with pytest.raises(DatasetError, match=words):
            read_hospitals(path)
    write_hospitals(tmp_path, HOSPITALS)
    path.write_text(path.read_text() + "A1\tOmega\tx\ty\n")
    with pytest.raises(DatasetError, match="the code A1 is both 'Alpha' and 'Omega'"):
        read_hospitals(path)
    path.write_text("Code\tSource\n")
    with pytest.raises(DatasetError, match="lacks the columns Source Site, TSS Code: expected TSS Code, Source Site"):
        read_hospitals(path)
    path.write_text("TSS Code\tSource Site\nA1\n")
    with pytest.raises(DatasetError, match="a row of fewer cells"):
        read_hospitals(path)
    (tmp_path / "list.txt").write_text("cancer_study_identifier: x\n")
    with pytest.raises(DatasetError, match="has no line `case_list_ids:`"):
        read_sequenced(tmp_path / "list.txt")


def test_tables_are_pinned(tmp_path: Path) -> None:
    write_hospitals(tmp_path, HOSPITALS)
    with pytest.raises(DatasetError, match=r"SHA256SUMS does not pin tissueSourceSite.tsv: expected [0-9a-f]{12}"):
        check_pinned(tmp_path, ["tissueSourceSite.tsv"])
    pin(tmp_path)
    assert list(check_pinned(tmp_path, ["tissueSourceSite.tsv"])) == ["tissueSourceSite.tsv"]
    write_hospitals(tmp_path, {"A1": "Another"})
    with pytest.raises(DatasetError, match="SHA256SUMS pins tissueSourceSite.tsv at [0-9a-f]{12}…: expected"):
        check_pinned(tmp_path, ["tissueSourceSite.tsv"])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=5, max_size=30), st.integers(0, 1000))
def test_folds_keep_hospitals_whole_and_do_not_depend_on_order(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    hospitals = np.repeat([f"H{i:02d}" for i in range(len(sizes))], sizes)
    strata = rng.choice(["LUAD/0", "LUAD/1", "BRCA/0"], len(hospitals))
    try:
        folds = hospital_folds(hospitals, strata, 5)
    except DatasetError as error:
        assert "of 5 folds empty" in str(error)
        return
    assert set(folds) == set(range(5))
    for hospital in set(hospitals):
        assert len(set(folds[hospitals == hospital])) == 1
    order = rng.permutation(len(hospitals))
    assert (hospital_folds(hospitals[order], strata[order], 5) == folds[order]).all()


def test_folds_are_even_where_hospitals_allow_it() -> None:
    rng = np.random.default_rng(0)
    hospitals = np.array([f"H{i:03d}" for i in rng.integers(0, 100, 2000)])
    strata = rng.choice(["a", "b", "c", "d"], 2000, p=[0.5, 0.3, 0.15, 0.05])
    folds = hospital_folds(hospitals, strata, 5)
    for stratum in "abcd":
        shares = np.bincount(folds[strata == stratum], minlength=5) / (strata == stratum).sum()
        assert np.abs(shares - 0.2).max() < 0.03
    with pytest.raises(DatasetError, match="3 hospitals cannot fill 5 folds"):
        hospital_folds(["a", "b", "c"], ["x"] * 3, 5)


def test_real_barcodes_keep_hospitals_on_one_side(shared_data: Path) -> None:
    """Grouped by code, one hospital lands on two sides; grouped by name it cannot."""
    with (shared_data / "tables/slideflow_lung_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    patients = [patient_of(row["slide"]) for row in rows]
    assert all(is_diagnostic(row["slide"]) for row in rows)
    sites, strata = np.array([row["site"] for row in rows]), [row["subtype"] for row in rows]
    folds = hospital_folds(sites, strata, 5)
    assert all(len(set(folds[sites == site])) == 1 for site in sites)
    shares = np.bincount(folds[np.array(strata) == "adenocarcinoma"], minlength=5) / strata.count("adenocarcinoma")
    assert shares.min() > 0.1 and shares.max() < 0.35
    by_code = hospital_folds([patient.split("-")[1] for patient in patients], strata, 5)
    assert any(len(set(by_code[sites == site])) > 1 for site in sites)


def test_tiles_are_nested_and_keyed_by_slide() -> None:
    x, y = (axis.ravel() * 448 for axis in np.meshgrid(np.arange(30), np.arange(20)))
    few, many = keyed_tiles("TCGA-A1-0001-01Z-00-DX1", x, y, 64), keyed_tiles("TCGA-A1-0001-01Z-00-DX1", x, y, 256)
    assert len(few) == 64 and set(few) < set(many)
    assert (np.diff(y[few] * 10**6 + x[few]) > 0).all()
    order = np.random.default_rng(0).permutation(len(x))
    assert set(order[keyed_tiles("TCGA-A1-0001-01Z-00-DX1", x[order], y[order], 64)]) == set(few)
    assert set(keyed_tiles("TCGA-A1-0002-01Z-00-DX1", x, y, 64)) != set(few)
    assert len(keyed_tiles("s", x[:5], y[:5], 64)) == 5
    # Which tiles they are is part of the definition: a change of the hash would be another data set.
    assert few[:6].tolist() == [10, 21, 25, 39, 50, 60]
    seed = name_key("TCGA-A1-0001-01Z-00-DX1")
    hashes = [key(seed, "tp53_v1", 0, (b << 32) + a) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert sorted(few) == sorted(sorted(range(len(x)), key=hashes.__getitem__)[:64])


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, tissue_config: TissueConfig) -> Iterator[tuple[Path, Catalog, Store]]:
    """20 patients of seven codes and five hospitals, a diagnostic slide each; two also have a frozen one, one has two."""
    folder = tmp_path_factory.mktemp("tcga")
    store = Store(StorageConfig({}, "fsspec", str(folder / "cache"), 1 << 30, 20.0, 5.0, 60.0))
    names = [slide_of(patient) for patient in PATIENTS]
    names += [f"{PATIENTS[0]}-01A-01-TS1.f", f"{PATIENTS[1]}-01A-01-BS1.f", slide_of(PATIENTS[2]).replace("DX1", "DX2")]
    tissue = tissue_pixels(1400, 920, whole=True)
    for number, name in enumerate(names):
        # 0.25 µm/px: tiles are 448 px, on a level of 0.5 µm/px that is stored
        pixels = np.roll(tissue, (17 * number, 31 * number), (0, 1))
        write_slide(folder / f"{name}.tif", downsamples=(1, 2), kind="generic", mpp=0.25, pixels=pixels)
    (folder / "manifest.csv").write_text("slide_id,uri\n" + "".join(f"{name},{name}.tif\n" for name in names))
    quiet = JournalConfig(progress="off", interval_s=10, wandb="off", wandb_project="t", tensorboard=False)
    journal = Journal(folder / "out", quiet)
    rows = read_manifest(str(folder / "manifest.csv"), store)
    yield folder, build_catalog(rows, store, tissue_config, folder / "catalog", 0, None, journal), store


PATIENTS = [f"TCGA-{code}-{i:04d}" for code in HOSPITALS for i in range(3)]
LUNG = [patient for patient in PATIENTS if patient[5:7] in ("A1", "B1", "C1", "D1", "E1")]
BREAST = [patient for patient in PATIENTS if patient not in LUNG]


def slide_of(patient: str) -> str:
    return f"{patient}-01Z-00-DX1.0f-{patient[-6:]}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The first two of a code are mutant in lung, the first in breast; the last patient was not sequenced."""
    lung = {f"{patient}-01": "Missense_Mutation" for patient in LUNG if patient[-1] in "01"}
    write_study(tmp_path, "luad", lung, [f"{patient}-01" for patient in LUNG[:-1]])
    breast = {f"{patient}-01": "Splice_Site" if patient[-1] == "0" else "Silent" for patient in BREAST}
    write_study(tmp_path, "brca", breast, [f"{patient}-01" for patient in BREAST])
    write_hospitals(tmp_path, HOSPITALS)
    pin(tmp_path)
    return tmp_path


def test_the_whole_way_by_hospital(root: Path, slides: tuple[Path, Catalog, Store]) -> None:
    _, catalog, store = slides
    patches = open_tp53(root, SITE, catalog, store, CUT)
    known = {slide_of(patient) for patient in PATIENTS if patient != LUNG[-1]} | {slide_of(PATIENTS[2]).replace("DX1", "DX2")}
    assert set(patches.slide_ids) == known and len(patches) == len(known) * 6
    assert patches.name == "tp53_v1/site (part)" and patches.usage.choose == "outer" and patches.usage.positive == "mutant"
    assert patches.notes[0].startswith("dataset.counts=any: BRCA 2/4, LUAD 10/4")
    for i in range(len(patches)):
        patient = patches.patients[i]
        study = "LUAD" if patient in LUNG else "BRCA"
        mutant = patient[-1] == "0" or (study == "LUAD" and patient[-1] == "1")
        assert (patches.studies[i], patches.labels[i], patches.sites[i]) == (study, mutant, HOSPITALS[patient[5:7]])
    # No hospital is on both sides, of a role or of a fold, although Alpha and Beta have two codes.
    for names in (patches.roles, patches.blocks):
        for hospital in set(patches.sites):
            assert len(set(names[patches.sites == hospital])) == 1
    assert set(patches.roles) == {"train", "select", "report"} and len(set(patches.blocks)) == 5
    # Pixels: the tile of the second level at its place.
    for slide_id in (patches.slide_ids[0], patches.slide_ids[-1]):
        row = catalog.row(slide_id)
        x, y = tissue_tiles(catalog, row, CUT)
        assert sorted(zip(y, x, strict=True)) == [(448 * r, 448 * c) for r in range(2) for c in range(3)]
        at = np.flatnonzero(patches.slide_ids == slide_id)
        level = catalog.reader(row, store).region(1, 0, 0, 700, 460)
        for pixels, corner in zip(patches.read(at), [(0, 0), (224, 0), (448, 0), (0, 224), (224, 224), (448, 224)], strict=True):
            left, top = corner
            assert (pixels.transpose(1, 2, 0) == level[top : top + 224, left : left + 224]).all()
    part = patches.only(patches.rows("report"))
    assert len(part.studies) == len(part) and (part.studies == patches.studies[patches.rows("report")]).all()


def test_fewer_tiles_are_some_of_the_more(
    root: Path, slides: tuple[Path, Catalog, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, catalog, store = slides

    def tiles(count: int) -> set[bytes]:
        monkeypatch.setattr(tp53, "TILES", count)
        patches = open_tp53(root, SITE, catalog, store, CUT)
        assert np.unique(patches.slide_ids, return_counts=True)[1].tolist() == [count] * len(set(patches.slide_ids))
        return {patch.tobytes() for patch in patches.read(np.arange(len(patches)))}

    two, four = tiles(2), tiles(4)
    assert len(two) == 42 and len(four) == 84 and two < four


def test_the_published_lists(root: Path, slides: tuple[Path, Catalog, Store]) -> None:
    _, catalog, store = slides

    def lists(**of_part: list[str]) -> None:
        for part, patients in of_part.items():
            (root / f"slides_ids_{part}.txt").write_text("".join(f"{slide_of(patient)}\n" for patient in patients))
        pin(root)

    with pytest.raises(DatasetError, match="expected the file slides_ids_train.txt of the published lists"):
        open_tp53(root, REF, catalog, store, CUT)
    lists(train=PATIENTS[:9], val=PATIENTS[9:12], test=PATIENTS[12:18])
    patches = open_tp53(root, REF, catalog, store, CUT)
    assert patches.name == "tp53_v1/ref (part)" and patches.usage.choose == "select"
    roles = {"train": PATIENTS[:9], "select": PATIENTS[9:12], "report": PATIENTS[12:18]}
    for role, patients in roles.items():
        assert set(patches.patients[patches.rows(role)]) == {p for p in patients if p != LUNG[-1]}
    assert set(patches.roles) == set(roles) and (patches.blocks == patches.patients).all()
    (root / "slides_ids_val.txt").write_text(slide_of(PATIENTS[2]).replace("DX1", "DX2") + ".svs\n")
    pin(root)
    with pytest.raises(DatasetError, match=f"1 patients stand in both train and select .{PATIENTS[2]}."):
        open_tp53(root, REF, catalog, store, CUT)
    lists(val=PATIENTS[:1])
    with pytest.raises(DatasetError, match="slides_ids_val.txt lists .* as another part does"):
        open_tp53(root, REF, catalog, store, CUT)
    lists(train=["TCGA-A1-9999"], val=["TCGA-A1-9998"], test=["TCGA-A1-9997"])
    with pytest.raises(DatasetError, match="list no slide of the catalog"):
        open_tp53(root, REF, catalog, store, CUT)


def test_what_is_wrong_is_named(root: Path, slides: tuple[Path, Catalog, Store]) -> None:
    _, catalog, store = slides
    words = re.escape("no study has 30 patients of each class with a diagnostic slide: found mutant/wild type BRCA 2/4")
    with pytest.raises(DatasetError, match=words):
        open_tp53(root, tp53_config(), catalog, store, CUT)
    with pytest.raises(DatasetError, match="dataset.split is 'code' and dataset.mpp 0.5: expected site or ref"):
        open_tp53(root, tp53_config(split="code"), catalog, store, CUT)
    before = open_tp53(root, SITE, catalog, store, CUT)
    mutations = root / "brca_tcga_pan_can_atlas_2018/data_mutations.txt"
    text = mutations.read_text()
    mutations.write_text(text.replace("Splice_Site", "Nonsense_Mutation"))
    with pytest.raises(DatasetError, match="SHA256SUMS pins brca_tcga_pan_can_atlas_2018/data_mutations.txt"):
        open_tp53(root, SITE, catalog, store, CUT)
    pin(root)
    assert open_tp53(root, SITE, catalog, store, CUT).hash != before.hash
    mutations.write_text(text.replace("Hugo_Symbol", "Gene"))
    with pytest.raises(DatasetError, match="data_mutations.txt lacks the columns Hugo_Symbol"):
        open_tp53(root, SITE, catalog, store, CUT)
    mutations.write_text(text)
    write_study(root, "lusc", {}, [f"{LUNG[0]}-01"])
    with pytest.raises(DatasetError, match=f"{LUNG[0]} stands in LUAD and LUSC: expected one study a patient"):
        open_tp53(root, SITE, catalog, store, CUT)
    with pytest.raises(DatasetError, match="holds no study: expected folders <study>_tcga_pan_can_atlas_2018"):
        open_tp53(root / "lusc_tcga_pan_can_atlas_2018", SITE, catalog, store, CUT)


def test_a_catalog_of_other_slides_is_refused(
    root: Path, tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    name = f"{PATIENTS[0]}-01A-01-TS1"
    make_slide(tmp_path / f"{name}.tif", compression="deflate", kind="generic")
    (tmp_path / "manifest.csv").write_text(f"slide_id,uri\n{name},{name}.tif\n")
    rows = read_manifest(str(tmp_path / "manifest.csv"), store)
    catalog = build_catalog(rows, store, tissue_config, tmp_path / "catalog", 0, None, journal)
    with pytest.raises(DatasetError, match="holds no diagnostic slide of TCGA: expected ids as TCGA-"):
        open_tp53(root, SITE, catalog, store, CUT)
