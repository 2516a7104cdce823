"""Public cohorts of slides: their layouts become manifests, with patients, sites, labels and splits that can be trusted."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from public_layouts import write_study
from pydantic import TypeAdapter
from slide_layouts import (
    RUMC_MPP,
    UMCU_MPP,
    write_camelyon16,
    write_camelyon17,
    write_panda,
    write_rows,
    write_slide_file,
    write_tcga,
)

from histoscale.data.manifest import Slide, read_manifest
from histoscale.data.splits import SplitError, groups
from histoscale.data.storage import Store
from histoscale.eval.cohorts.camelyon16 import Camelyon16Config, read_camelyon16
from histoscale.eval.cohorts.camelyon17 import Camelyon17Config, read_camelyon17
from histoscale.eval.cohorts.cohort import Cohort, CohortError, LabelTable, check_rows, digest, with_labels, write_manifest
from histoscale.eval.cohorts.panda import PandaConfig, eva_split, read_panda
from histoscale.eval.cohorts.tcga import TcgaConfig, check_sites, one_name, read_tcga
from histoscale.eval.datasets.tcga import plain_hospital, read_hospitals, read_projects
from histoscale.eval.mil.bags import Bag, Bags
from histoscale.eval.mil.split import FixedSplit, FoldSplit, SiteSplit, SplitConfig, make_plan
from histoscale.eval.mil.task import Task, TaskConfig, read_targets
from histoscale.eval.scores.auroc import auroc
from histoscale.launch.run import execute

C16 = Camelyon16Config(kind="camelyon16", counts="published")
C17 = Camelyon17Config(kind="camelyon17", counts="published")
LABELS = {"key": "patient", "by": "patient_id"}


def by_id(cohort: Cohort) -> dict[str, dict[str, str]]:
    return {row["slide_id"]: row for row in cohort.rows}


def read_back(cohort: Cohort, folder: Path, store: Store) -> list[Slide]:
    check_rows(cohort)
    write_manifest(folder / "manifest.csv", cohort)
    return read_manifest(str(folder / "manifest.csv"), store)


# --- Camelyon16 ---


@pytest.fixture(scope="module")
def camelyon16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_camelyon16(tmp_path_factory.mktemp("CAMELYON16"))


def test_camelyon16_as_published(camelyon16: Path, tmp_path: Path, store: Store) -> None:
    cohort = read_camelyon16(camelyon16, C16, store)
    rows = by_id(cohort)
    assert Counter((row["eva"], row["label"]) for row in cohort.rows) == {
        ("train", "normal"): 127, ("train", "tumor"): 89, ("val", "normal"): 32, ("val", "tumor"): 22, ("test", "normal"): 80,
        ("test", "tumor"): 49,
    }  # fmt: skip
    assert rows["normal_100"]["site"] == "RUMC" and rows["normal_101"]["site"] == "UMCU"
    assert rows["tumor_070"]["site"] == "RUMC" and rows["tumor_071"]["site"] == "UMCU"
    assert rows["tumor_111"]["site"] == "RUMC"  # its header says so, not its number
    assert rows["test_002"]["site"] == "RUMC" and rows["test_003"]["site"] == "UMCU"
    assert rows["test_002"]["size"] == "Macro" and rows["test_003"]["size"] == ""
    assert rows["tumor_001"]["annotations"].endswith("tumor_001.xml") and rows["normal_001"]["annotations"] == ""
    slides = read_back(cohort, tmp_path, store)
    assert len(slides) == 399 and slides[0].labels["label"] == "normal" and Path(slides[0].uri).is_file()


def test_camelyon16_withdrawn_slides_are_left_out_by_name(camelyon16: Path, store: Store) -> None:
    strays = (camelyon16 / "training/normal/normal_086.tif", camelyon16 / "testing/images/test_049.tif")
    for path in strays:
        write_slide_file(path)
    try:
        cohort = read_camelyon16(camelyon16, C16, store)
    finally:
        for path in strays:
            path.unlink()
    assert set(cohort.left_out) == {"normal_086", "test_049"} and len(cohort.rows) == 399


def test_camelyon16_refuses_a_part_unless_it_is_meant(tmp_path: Path, store: Store) -> None:
    for name, mpp in (("normal_001", RUMC_MPP), ("tumor_001", RUMC_MPP), ("test_001", UMCU_MPP)):
        write_slide_file(tmp_path / f"images/{name}.tif", mpp)
    (tmp_path / "images/test_002.tif").write_bytes(b"II*\0 no slide")
    (tmp_path / "reference.csv").write_text("test_001,Tumor,IDC,Macro\ntest_002,Normal,IDC,None\n")
    with pytest.raises(CohortError, match=r"1 training normal \(published: 159\).*collection.counts=any"):
        read_camelyon16(tmp_path, C16, store)
    cohort = read_camelyon16(tmp_path, Camelyon16Config("camelyon16", "any"), store)  # another mirror's folders
    assert [row["site"] for row in cohort.rows] == ["RUMC", "UMCU", "", "RUMC"]
    assert any("a part of Camelyon16" in note for note in cohort.notes) and any("test_002" in note for note in cohort.notes)
    (tmp_path / "reference.csv").write_text("test_001,Tumor,IDC,Macro\n")
    with pytest.raises(CohortError, match="does not name test_002"):
        read_camelyon16(tmp_path, Camelyon16Config("camelyon16", "any"), store)
    (tmp_path / "reference.csv").write_text("test_001,Maybe\n")
    with pytest.raises(CohortError, match="line 1"):
        read_camelyon16(tmp_path, Camelyon16Config("camelyon16", "any"), store)


# --- Camelyon17 ---


def test_camelyon17_as_published(tmp_path: Path, store: Store) -> None:
    cohort = read_camelyon17(write_camelyon17(tmp_path / "c17"), C17)
    slides = read_back(cohort, tmp_path, store)
    assert len(slides) == 500 and len({slide.patient_id for slide in slides}) == 100
    assert Counter(slide.site for slide in slides) == {f"center_{i}": 100 for i in range(5)}
    rows = by_id(cohort)
    assert rows["patient_039_node_4"]["site"] == "center_1" and rows["patient_039_node_4"]["patient_id"] == "patient_039"
    assert {row["stage"] for row in cohort.rows} == {"negative", "itc", "micro", "macro"}
    assert {row["pn_stage"] for row in cohort.rows} == {"pN0", "pN1"} and cohort.counts["with lesions"] == 50


def test_camelyon17_tells_what_contradicts_the_table(tmp_path: Path) -> None:
    root = write_camelyon17(tmp_path, patients=21)
    anything = Camelyon17Config("camelyon17", "any")
    with pytest.raises(CohortError, match=r"105 labelled nodes \(published: 500\)"):
        read_camelyon17(root, C17)
    (root / "training/center_0/patient_000/patient_000_node_0.tif").unlink()
    write_slide_file(root / "testing/patients/patient_150_node_2.tif")
    cohort = read_camelyon17(root, anything)
    assert cohort.left_out == {"patient_000_node_0": "in the table, but its slide was not found"}
    unknown = by_id(cohort)["patient_150_node_2"]
    assert unknown["stage"] == "" and unknown["site"] == ""  # whose labels and centre are not published
    write_slide_file(root / "training/center_3/patient_001_node_9.tif")
    with pytest.raises(CohortError, match="lies in the folder of centre 3: patient 1 is of centre 0"):
        read_camelyon17(root, anything)
    (root / "training/center_3/patient_001_node_9.tif").unlink()
    write_rows(root / "training/stage_labels.csv", [{"patient": "patient_000_node_0.tif", "stage": "huge"}])
    with pytest.raises(CohortError, match="'huge'"):
        read_camelyon17(root, anything)


# --- PANDA ---


def restated_split(ids: list[str], grades: list[int], shares: tuple[float, ...]) -> dict[str, set[str]]:
    """Section 1.12 in other words: one generator for all classes, floors, the remainder to test."""
    generator = np.random.default_rng(42)
    parts: dict[str, set[str]] = defaultdict(set)
    for grade in sorted(set(grades)):
        own = np.array([i for i, other in enumerate(grades) if other == grade])
        generator.shuffle(own)
        first, second = int(shares[0] * len(own)), int(shares[0] * len(own)) + int(shares[1] * len(own))
        for part, places in (("train", own[:first]), ("val", own[first:second]), ("test", own[second:])):
            parts[part] |= {ids[i] for i in places}
    return parts


def test_panda_with_evas_split(tmp_path: Path, store: Store) -> None:
    root = write_panda(tmp_path / "panda", 300, noisy=True)
    cohort = read_panda(root, PandaConfig("panda", "any", "train_with_noisy_labels.csv"))
    slides = read_back(cohort, tmp_path, store)
    assert len(slides) == 300 and {slide.site for slide in slides} == {"karolinska", "radboud"}
    assert {slide.patient_id for slide in slides} == {None}
    table = list(csv.DictReader((root / "train_with_noisy_labels.csv").open()))
    kept = sorted(row["image_id"] for row in table if row["noise_ratio_10"] != "0")
    grade = {row["image_id"]: int(row["isup_grade"]) for row in table}
    expected = restated_split(kept, [grade[name] for name in kept], (0.7, 0.15, 0.15))
    found = {part: {row["slide_id"] for row in cohort.rows if row["eva"] == part} for part in ("train", "val", "test")}
    assert found == expected and set().union(*found.values()) == set(kept)
    assert {row["slide_id"] for row in cohort.rows if row["eva"] == ""} == set(grade) - set(kept)
    sums = hashlib.sha256("\n".join(sorted(expected["val"])).encode()).hexdigest()
    assert digest(cohort, "eva", "val") == sums
    small = Counter(row["eva_small"] for row in cohort.rows)
    assert 0 < small["val"] == small["test"] < small["train"] < 40


def test_evas_split_of_panda_by_its_checksums() -> None:
    """Only with the real table (analokmaus/kaggle-panda-challenge-public:train.csv), whose path HISTOSCALE_PANDA_TABLE gives."""
    path = os.environ.get("HISTOSCALE_PANDA_TABLE")
    if not path:
        pytest.skip("HISTOSCALE_PANDA_TABLE does not name PANDA's table with noise ratios")
    rows = {row["image_id"]: row for row in csv.DictReader(Path(path).open())}
    kept = sorted(name for name, row in rows.items() if float(row["noise_ratio_10"]) != 0)
    grades = [int(rows[name]["isup_grade"]) for name in kept]
    sums = {
        (0.7, 0.15, 0.15): ("eb11f82f1ca2", "e303caff4d8e", "db2184dec7f3"),
        (0.1, 0.05, 0.05): ("6c7fb0e042e0", "a78d445a6a4c", "edd41eb23992"),
    }
    for shares, expected in sums.items():
        parts = eva_split(kept, grades, shares)
        for part, beginning in zip(("train", "val", "test"), expected, strict=True):
            ids = sorted(name for name, own in parts.items() if own == part)
            assert hashlib.sha256("\n".join(ids).encode()).hexdigest().startswith(beginning)


def test_panda_tells_what_is_missing(tmp_path: Path) -> None:
    root = write_panda(tmp_path, 8, noisy=False)
    with pytest.raises(CohortError, match=r"8 slides \(published: 10616\)"):
        read_panda(root, PandaConfig("panda", "published", None))
    with pytest.raises(CohortError, match="train_with_noisy_labels.csv cannot be read"):
        read_panda(root, PandaConfig("panda", "any", "train_with_noisy_labels.csv"))
    first = next((root / "train_images").iterdir())
    first.unlink()
    cohort = read_panda(root, PandaConfig("panda", "any", None))
    assert cohort.left_out == {first.stem: "in the table, but its image was not found"} and "eva" not in cohort.rows[0]
    rows = list(csv.DictReader((root / "train.csv").open()))
    write_rows(root / "train.csv", [{**rows[0], "isup_grade": "7"}, *rows[1:]])
    with pytest.raises(CohortError, match="ISUP grade '7'"):
        read_panda(root, PandaConfig("panda", "any", None))


# --- TCGA ---

GDC = (  # rows of the GDC's table: one hospital under several codes and spellings
    ("21", "Fox Chase Cancer Center", "Lung squamous cell carcinoma"),
    ("64", "Fox Chase", "Lung adenocarcinoma"),
    ("46", "St. Joseph's Medical Center (MD)", "Lung squamous cell carcinoma"),
    ("67", "St Joseph's Medical Center (MD)", "Lung adenocarcinoma"),
    ("AS", "St. Joseph's Medical Center-(MD)", "Kidney renal clear cell carcinoma"),
    ("22", "Mayo Clinic - Rochester", "Lung squamous cell carcinoma"),
    ("MP", "Washington University - Mayo Clinic", "Lung adenocarcinoma"),
    ("2H", "Erasmus MC", "Esophageal carcinoma "),
)
DX = "TCGA-{}-{}-01Z-00-DX1.3C6198CF-3E13-4C4C-B851-5BDFF8552621.svs"
TS = "TCGA-{}-{}-01A-01-TS1.f6baa937-6390-4b2f-916b-705be1bb8926.svs"


def test_tcga_site_is_the_hospital_and_never_the_code(tmp_path: Path, store: Store) -> None:
    names = {DX.format(code, f"A{i:03d}"): f"uuid-{i}" for i, (code, _, _) in enumerate(GDC)}
    names |= {TS.format("21", "A000"): "frozen", "notes.svs": "other"}
    root = write_tcga(tmp_path / "tcga", names, GDC)
    cohort = read_tcga(root, TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", None))
    check_sites(cohort)
    slides = read_back(cohort, tmp_path, store)
    site = {slide.slide_id.split("-")[1]: slide.site for slide in slides}
    assert site["21"] == site["64"] == "Fox Chase Cancer Center"
    assert site["46"] == site["67"] == site["AS"] and site["22"] == site["MP"] != site["2H"]
    assert {slide.cohort for slide in slides} == {"TCGA-LUSC", "TCGA-LUAD", "TCGA-KIRC", "TCGA-ESCA"}
    assert slides[0].patient_id == "-".join(slides[0].slide_id.split("-")[:3]) and slides[0].preparation == "FFPE"
    assert Counter(cohort.left_out.values()) == {"no diagnostic slide": 1, "its name is no barcode of a TCGA slide": 1}
    everything = read_tcga(root, TcgaConfig("tcga", "all", "tissueSourceSite.tsv", None))
    assert Counter(row["preparation"] for row in everything.rows) == {"FFPE": 8, "frozen": 1}


def test_tcga_refuses_codes_as_sites(tmp_path: Path) -> None:
    root = write_tcga(tmp_path, {DX.format("21", "A000"): "a", DX.format("64", "A001"): "b"}, GDC[:1])
    with pytest.raises(CohortError, match="lacks the source-site code '64'"):
        read_tcga(root, TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", None))
    bare = read_tcga(root, TcgaConfig("tcga", "diagnostic", None, None))
    with pytest.raises(CohortError, match="no slide has a site"):
        check_sites(bare)
    write_rows(tmp_path / "codes.csv", [{"patient": f"TCGA-{c}-A00{i}", "tss": c} for i, c in enumerate(("21", "64"))])
    coded = with_labels(bare, LabelTable(str(tmp_path / "codes.csv"), columns={"tss": "site"}, **LABELS))
    with pytest.raises(CohortError, match="the sites are the two-letter codes"):
        check_sites(coded)
    half = replace(coded, rows=(coded.rows[0], {**coded.rows[1], "site": ""}))
    with pytest.raises(CohortError, match="the sites are the two-letter codes"):
        check_sites(half)
    told = replace(coded, rows=({**coded.rows[0], "site": "Mayo Clinic"}, {**coded.rows[1], "site": "Mayo Clinic - Rochester"}))
    assert len({row["site"] for row in one_name(told).rows}) == 1


def test_the_gdc_table_may_name_codes_of_no_barcode(tmp_path: Path) -> None:
    path = write_tcga(tmp_path, {}, GDC) / "tissueSourceSite.tsv"
    assert "LUSC" not in read_hospitals(path) and read_projects(path)["2H"] == "TCGA-ESCA"
    assert plain_hospital("St. Joseph's Medical Center-(MD)") == plain_hospital("St Joseph's Medical Center (MD)")


def test_tcga_tp53_by_the_patients_variants(tmp_path: Path) -> None:
    root = write_tcga(tmp_path, {DX.format("64", f"A00{i}"): f"u{i}" for i in range(4)}, GDC)
    sequenced = [f"TCGA-64-A00{i}-01" for i in (0, 1, 2)]
    mutants = {"TCGA-64-A000-01": "Missense_Mutation", "TCGA-64-A001-01": "Silent"}
    write_study(root / "studies", "luad", mutants, sequenced)
    cohort = read_tcga(root, TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", "studies"))
    assert [row["tp53"] for row in cohort.rows] == ["1", "0", "0", ""] and cohort.counts["TP53 wild type"] == 2
    with pytest.raises(CohortError, match="holds no study"):
        read_tcga(root, TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", "elsewhere"))


# --- labels of another table ---


def test_labels_join_by_slide_or_patient_and_may_relabel(tmp_path: Path) -> None:
    root = write_tcga(tmp_path, {DX.format("21", f"A00{i}"): f"u{i}" for i in range(3)}, GDC)
    cohort = read_tcga(root, TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", None))
    write_rows(tmp_path / "t.csv", [{"patient": f"TCGA-21-A00{i}", "subtype": "ab"[i % 2], "bad": i} for i in (0, 1, 7)] * 2)
    table = LabelTable(str(tmp_path / "t.csv"), columns={"subtype": "label"}, **LABELS)
    found = with_labels(cohort, table)
    assert [row["label"] for row in found.rows] == ["a", "b", ""]
    assert found.counts["named by the label table"] == 2 and found.counts["of the label table without a slide"] == 1
    (tmp_path / "over.tsv").write_text("file\tnew\nTCGA-21-A000-01Z-00-DX1.svs\tb\n")
    overlaid = with_labels(found, LabelTable(str(tmp_path / "over.tsv"), "file", "slide_id", {"new": "label"}))
    assert [row["label"] for row in overlaid.rows] == ["b", "b", ""] and overlaid.counts["relabelled"] == 1


def test_a_label_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    root = write_tcga(tmp_path, {DX.format("21", "A000"): "u"}, GDC)
    cohort = read_tcga(root, TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", None))
    path = tmp_path / "t.csv"
    write_rows(path, [{"patient": "TCGA-21-A000", "label": 0}, {"patient": "tcga-21-a000", "label": 1}])
    with pytest.raises(CohortError, match="says two things of tcga-21-a000"):
        with_labels(cohort, LabelTable(str(path), columns={"label": "label"}, **LABELS))
    with pytest.raises(CohortError, match="names none of the 1 slides"):
        with_labels(cohort, LabelTable(str(path), "label", "slide_id", {"label": "label"}))
    with pytest.raises(CohortError, match="lacks the column stage"):
        with_labels(cohort, LabelTable(str(path), columns={"stage": "label"}, **LABELS))
    with pytest.raises(CohortError, match="needs labels.key and labels.columns"):
        LabelTable(str(path), "", "slide_id", {})


def test_one_slide_in_two_files_is_refused(tmp_path: Path) -> None:
    names = {DX.format("21", "A000"): "u", "TCGA-21-A000-01Z-00-DX1.svs": "v"}
    cohort = read_tcga(write_tcga(tmp_path, names, GDC), TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", None))
    with pytest.raises(CohortError, match="TCGA-21-A000-01Z-00-DX1 is there more than once"):
        check_rows(cohort)


# --- real tables ---


def test_real_tcga_tables_split_without_overlap(shared_data: Path, tmp_path: Path, store: Store) -> None:
    """941 slides whose table knows the hospitals: no hospital and no patient on both sides; and what a site alone tells."""
    table = shared_data / "tables/slideflow_lung_labels.csv"
    if not table.is_file():
        pytest.skip(f"{table} is not here")
    real = list(csv.DictReader(table.open()))
    root = write_tcga(tmp_path / "tcga", {f"{row['slide']}.svs": "" for row in real}, GDC)
    bare = read_tcga(root, TcgaConfig("tcga", "diagnostic", None, None))
    cohort = with_labels(bare, LabelTable(str(table), "patient", "patient_id", {"subtype": "subtype", "site": "site"}))
    check_sites(cohort)
    slides = read_back(cohort, tmp_path, store)
    assert len(slides) == 941 and {slide.site for slide in slides} == {row["site"] for row in real}
    task = committed_task("tcga_lung")
    bags = bags_of(slides, task, "patient")
    rows = bags.rows
    assert {row.slide_id for row in rows} == {slide.slide_id for slide in slides}
    plan = make_plan(bags, SiteSplit(kind="sites", unit="patient", blocks=5, folds=5, seed=0))
    labels = np.array([row.target for row in rows])
    held: Counter[int] = Counter()
    for trial in plan.trials[:5]:
        inside, outside = ({rows[i].site for i in part} for part in (trial.train, trial.external))
        assert trial.external and not inside & outside
        assert len({row.group for row in rows}) == len({rows[i].group for i in (*trial.train, *trial.external)}) == 941
        held.update(trial.external)
        share = labels[list(trial.external)].mean()
        assert 0.3 < share < 0.7, f"{trial.name}: {share:.2f} squamous"
    assert held == Counter(range(941))
    hospital = auroc(labels, share_by(labels, [row.site for row in rows]))
    code = auroc(labels, share_by(labels, [row.group.split("-")[1] for row in rows]))
    print(f"what a site tells of the subtype, in sample: hospital AUC {hospital:.3f}, code AUC {code:.3f}")
    assert code == 1.0 and 0.5 < hospital < 0.9


def share_by(labels: np.ndarray, names: list[str]) -> np.ndarray:
    """The share of positives of each row's name: the site prior."""
    share = {name: np.mean([label for label, own in zip(labels, names, strict=True) if own == name]) for name in set(names)}
    return np.array([share[name] for name in names])


def committed_task(name: str) -> Task:
    path = Path(__file__).resolve().parents[1] / f"configs/task/{name}.yaml"
    task: Task = TypeAdapter(TaskConfig).validate_python(yaml.safe_load(path.read_text()))
    return task


def test_hospitals_of_the_whole_gdc_table_agree_with_another_grouping(shared_data: Path) -> None:
    """Only with the GDC's own table, which HISTOSCALE_GDC_SITES names: no hospital of slideflow's labels is torn by our names,
    and every lung code is of the project that its subtype says."""
    path = os.environ.get("HISTOSCALE_GDC_SITES")
    table = shared_data / "tables/slideflow_lung_labels.csv"
    if not path or not table.is_file():
        pytest.skip("HISTOSCALE_GDC_SITES does not name the GDC's tissueSourceSite.tsv, or the labels are not here")
    hospitals, projects = read_hospitals(Path(path)), read_projects(Path(path))
    names, project = defaultdict(set), {"adenocarcinoma": "TCGA-LUAD", "squamous": "TCGA-LUSC"}
    for row in csv.DictReader(table.open()):
        code = row["patient"].split("-")[1]
        names[row["site"]].add(hospitals[code])
        assert projects[code] == project[row["subtype"]]
    assert len(names) == 39 and all(len(own) == 1 for own in names.values())
    assert len(set().union(*names.values())) == 37  # St. Joseph's (MD) and Mayo Clinic stand there under two names each


def test_the_five_gene_table_joins_by_slide(shared_data: Path, tmp_path: Path, store: Store) -> None:
    table = shared_data / "tables/gigapath_LUAD-5-gene_TCGA.csv"
    if not table.is_file():
        pytest.skip(f"{table} is not here")
    real = list(csv.DictReader(table.open()))
    lung = [(code, f"hospital {code}", "Lung adenocarcinoma") for code in sorted({row["slide_id"].split("-")[1] for row in real})]
    root = write_tcga(tmp_path / "tcga", {row["file_name"]: row["id"] for row in real}, lung)
    cohort = read_tcga(root, TcgaConfig("tcga", "all", "tissueSourceSite.tsv", None))
    labels = LabelTable(str(table), "slide_id", "slide_id", {"TP53": "tp53", "EGFR": "egfr"})
    found = with_labels(cohort, labels)
    assert found.counts["named by the label table"] == len(real) == 1345 and {row["tp53"] for row in found.rows} == {
        "True",
        "False",
    }
    slides = read_back(found, tmp_path, store)
    assert len({slide.patient_id for slide in slides}) == 521 == len({row["pat_id"] for row in real})
    assert Counter(slide.preparation for slide in slides) == {"FFPE": 529, "frozen": 786, None: 30}
    told = {row["slide_id"]: row["is_ffpe"] == "True" for row in real}
    assert all(told[s.slide_id.split(".")[0]] == (s.preparation == "FFPE") for s in slides if s.preparation)
    patient = {slide.slide_id.split(".")[0]: slide.patient_id for slide in slides}
    assert all(patient[row["slide_id"]] == row["case_submitter_id"] for row in real)


@pytest.mark.parametrize(
    ("name", "cohort"), [("camelyon16", "c16"), ("camelyon17", "c17"), ("camelyon17_stage", "c17"), ("panda", "panda")]
)
def test_every_task_finds_its_labels(name: str, cohort: str, tmp_path: Path, store: Store) -> None:
    if cohort == "c16":
        read = read_camelyon16(write_camelyon16(tmp_path / cohort), C16, store)
    elif cohort == "c17":
        read = read_camelyon17(write_camelyon17(tmp_path / cohort), C17)
    else:
        read = read_panda(write_panda(tmp_path / cohort, 60, noisy=False), PandaConfig("panda", "any", None))
    targets, left_out = read_targets(read_back(read, tmp_path, store), committed_task(name))
    assert len(targets) == len(read.rows) and not left_out
    assert len({target.value for target in targets.values()}) == {"panda": 6, "camelyon17_stage": 4}.get(name, 2)


def bags_of(slides: list[Slide], task: Task, unit: str) -> Bags:
    """The study of a manifest, without features."""
    targets = read_targets(slides, task)[0]
    rows = [
        Bag(
            slide.slide_id, slide.slide_id if unit == "slide" else slide.patient_id or "", slide.site or "",
            targets[slide.slide_id].value, True, Path(), 1, 1, 1.0, slide.labels,
        )
        for slide in slides
        if slide.slide_id in targets
    ]  # fmt: skip
    return Bags(tuple(rows), 1, "none", 0.5, unit, {})


def committed_split(name: str, **changed: object) -> FixedSplit | FoldSplit | SiteSplit:
    path = Path(__file__).resolve().parents[1] / f"configs/split/{name}.yaml"
    adapter: TypeAdapter[FixedSplit | FoldSplit | SiteSplit] = TypeAdapter(SplitConfig)
    return adapter.validate_python({**yaml.safe_load(path.read_text()), **changed})


def test_published_parts_and_sites_become_plans(camelyon16: Path, tmp_path: Path, store: Store) -> None:
    bags = bags_of(read_back(read_camelyon16(camelyon16, C16, store), tmp_path, store), committed_task("camelyon16"), "patient")
    for role in ("split", "eva"):
        (trial,) = make_plan(bags, committed_split("official", role=role)).trials
        assert (len(trial.train), len(trial.internal), len(trial.external)) == (270, 129, 0)
    (trial,) = make_plan(bags, committed_split("patients", external_sites=["UMCU"])).trials
    assert {bags.rows[i].site for i in trial.external} == {"UMCU"} and {bags.rows[i].site for i in trial.train} == {"RUMC"}

    nodes = read_back(read_camelyon17(write_camelyon17(tmp_path / "c17"), C17), tmp_path, store)
    plan = make_plan(bags_of(nodes, committed_task("camelyon17_stage"), "patient"), committed_split("sites"))
    assert [trial.name for trial in plan.trials[:5]] == [f"site center_{i}" for i in range(5)]
    assert all(len(trial.external) == 100 and len(trial.train) == 400 for trial in plan.trials[:5])

    noisy = PandaConfig("panda", "any", "train_with_noisy_labels.csv")
    panda = read_back(read_panda(write_panda(tmp_path / "panda", 120, noisy=True), noisy), tmp_path, store)
    with pytest.raises(SplitError, match="have no patient_id"):
        groups(panda, "patient")
    bags = bags_of(panda, committed_task("panda"), "slide")
    plan = make_plan(bags, committed_split("patients", unit="slide", external_sites=["radboud"]))
    assert len(plan.trials[0].external) == 60 and not plan.checks[1].holds  # patients are unknown, and the page says so
    plan = make_plan(bags, committed_split("official", unit="slide", role="eva"))
    assert set(plan.left_out.values()) == {"it has no eva and is in no part of the split"}


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("TCGA-21-A000-01Z-00-DX1.svs", "._TCGA-21-A000-01Z-00-DX1.svs", "TCGA-21-A001-01Z-00-DX1.svs.partial"):
        (tmp_path / "disk/uuid").mkdir(parents=True, exist_ok=True)
        (tmp_path / "disk/uuid" / name).touch()
    (tmp_path / "root").mkdir()
    root = write_tcga(tmp_path / "root", {}, GDC)
    (root / "slides").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(root)  # into itself
    cohort = read_tcga(root, TcgaConfig("tcga", "diagnostic", "tissueSourceSite.tsv", None))
    assert [row["uri"] for row in cohort.rows] == [str(root / "slides/uuid/TCGA-21-A000-01Z-00-DX1.svs")] and not cohort.left_out
    with pytest.raises(CohortError, match="is no folder"):
        read_tcga(tmp_path / "elsewhere", TcgaConfig("tcga", "diagnostic", None, None))


# --- the command ---


def test_the_command_writes_what_index_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_panda(tmp_path / "panda", 24, noisy=True)
    arguments = [
        "collection=panda", "collection.counts=any", "collection.noisy=train_with_noisy_labels.csv", f"root={root}",
        "logging.progress=lines",
    ]  # fmt: skip
    command = [sys.executable, "-m", "histoscale.launch.manifest", *arguments, f"out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "isup by site: 0, 1, 2, 3, 4, 5" in done.stderr and "! PANDA publishes no patient ids" in done.stderr
    found = json.loads((tmp_path / "out/summary.json").read_text())["manifest"]
    assert found["slides"] == 24 and found["sites"] == {"karolinska": 12, "radboud": 12} and found["patients"] is None
    assert set(found["splits"]["eva"]) == {"train", "val", "test"} and len(found["splits"]["eva"]["val"]["sha256"]) == 64
    arguments = [f"manifest={tmp_path / 'out/manifest.csv'}", f"out={tmp_path / 'catalog'}", "logging.progress=off"]
    assert execute("index", arguments) == 2  # these slides hold no tissue
    assert "none of the 24 slides was accepted" in capsys.readouterr().err
    assert execute("manifest", ["collection=panda", f"root={root}", f"out={tmp_path / 'no'}"]) == 2
    assert "24 slides (published: 10616)" in capsys.readouterr().err
