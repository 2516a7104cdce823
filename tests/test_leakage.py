"""What an encoder has seen of a labelled set: the same slide under its other names, the same patient, the same pixels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from set_fixtures import write_pcam

from histoscale.data.index import build_catalog
from histoscale.data.journal import Journal
from histoscale.data.manifest import read_manifest
from histoscale.data.names import patient_key, slide_key
from histoscale.data.storage import Store
from histoscale.data.tissue import TissueConfig
from histoscale.eval.datasets.patches import USAGE_OF_OWN, LabelledPatches
from histoscale.eval.datasets.pcam import open_pcam
from histoscale.eval.datasets.public import PublicConfig
from histoscale.eval.features import pixel_hash
from histoscale.eval.leakage import (
    Corpus,
    Duplicate,
    corpus_of_catalog,
    duplicates,
    find_leaks,
    published_corpora,
    recorded_corpora,
    shared_sources,
    trained_on,
)

UUID = "0E2D6A3B-6F4C-4C4E-9E2A-1B2C3D4E5F60"


def corpus(slides: tuple[str, ...] = (), patients: tuple[str, ...] = ()) -> Corpus:
    return Corpus("the corpus", frozenset(slides), frozenset(patients), ())


def labelled(slides: list[str], roles: list[str], patients: list[str] | None = None) -> LabelledPatches:
    n = len(slides)
    names = np.array(patients if patients is not None else [f"image {i}" for i in range(n)])
    return LabelledPatches(
        "set", ("a", "b"), np.arange(n) % 2, np.array(roles), names, np.full(n, ""), "none" if patients is None else "patient",
        0.5, 8, "h", lambda rows: np.zeros((len(rows), 3, 8, 8), np.uint8), names, np.array(slides), USAGE_OF_OWN,
    )  # fmt: skip


@pytest.mark.parametrize("ours, theirs", [
    ("a1", "a1.svs"), ("A1.ndpi", "a1"), ("a1.ome.tif", "a1.ome.tiff"), ("x.y", "x.y.mrxs"),
    ("TCGA-AA-3872-01Z-00-DX1", f"TCGA-AA-3872-01Z-00-DX1.{UUID}.svs"),
    ("tcga-aa-3872-01z-00-dx1.svs", "TCGA-AA-3872-01Z-00-DX1"),
    ("TCGA-AA-3872-01Z", "TCGA-AA-3872-01Z-00-DX1"), ("TCGA-AA-3872-01Z-00-DX1", "TCGA-AA-3872-01Z"),
    ("camelyon16_train_tumor_062", "tumor_062.tif"), ("camelyon16_test_001", "test_001.tif"),
    ("camelyon16_train_normal_010", "Normal_010.tiff"),
])  # fmt: skip
def test_a_slide_is_found_under_its_other_names(ours: str, theirs: str) -> None:
    for first, second in ((ours, theirs), (theirs, ours)):
        (leak,) = find_leaks(labelled([first, "other"], ["report", "report"]), corpus((second,)))
        assert leak.slides == (first,) and leak.role == "report" and (leak.images, leak.total) == (1, 2)


@pytest.mark.parametrize("ours, theirs", [
    ("a1", "a11"), ("a1", "a1-2"), ("camelyon16_train_tumor_062", "normal_062"),
    ("camelyon16_test_001", "camelyon16_train_tumor_001"),
    ("", ""), ("TCGA-AA-3872-01Z-00-DX1", "TCGA-AB-3872-01Z-00-DX1"),
])  # fmt: skip
def test_another_slide_is_none_of_it(ours: str, theirs: str) -> None:
    assert not find_leaks(labelled([ours], ["report"]), corpus((theirs,)))


def test_another_slide_of_a_tcga_patient_is_the_patient() -> None:
    patches = labelled(["TCGA-AA-3872-01Z-00-DX1", "TCGA-AA-9999-01Z-00-DX1"], ["train", "report"])
    (leak,) = find_leaks(patches, corpus((f"TCGA-AA-3872-01Z-00-DX2.{UUID}.svs",)))
    assert leak.role == "train" and not leak.slides and leak.patients == ("TCGA-AA-3872",)
    assert "1 of 1 images in train come from 1 patients of the corpus (TCGA-AA-3872)" in leak.sentence()


def test_patients_are_found_role_by_role() -> None:
    patches = labelled([""] * 5, ["train", "select", "report", "report", ""], ["p1", "P2", "p3", "TCGA-AA-1234", "p1"])
    leaks = find_leaks(patches, corpus(patients=("P1", "p2 ", "tcga-aa-1234-01z")))
    assert [(leak.role, leak.patients, leak.images, leak.total) for leak in leaks] == [
        ("train", ("p1",), 1, 1), ("select", ("P2",), 1, 1), ("report", ("TCGA-AA-1234",), 1, 2)
    ]  # fmt: skip
    assert not find_leaks(replace(patches, groups="none"), corpus(patients=("p1",)))  # image names are no patients


def test_keys() -> None:
    assert slide_key(f"TCGA-3L-AA1B-01Z-00-DX1.{UUID}.svs") == "TCGA-3L-AA1B-01Z-00-DX1"
    assert patient_key("TCGA-3L-AA1B-01Z-00-DX1") == "TCGA-3L-AA1B" and patient_key(" Ab ") == "ab"


def test_pcams_slides_against_a_catalog(
    tmp_path: Path, make_slide: Callable[..., Path], store: Store, tissue_config: TissueConfig, journal: Journal
) -> None:
    """Two Camelyon16 slides in a real catalog, one of which alone was trained on."""
    for name in ("tumor_001", "normal_002"):
        make_slide(tmp_path / f"{name}.tif", compression="deflate", kind="generic", seed=1)
    rows = "".join(f"{name},{name}.tif,P-{name},CAMELYON16\n" for name in ("tumor_001", "normal_002"))
    (tmp_path / "manifest.csv").write_text("slide_id,uri,patient_id,cohort\n" + rows)
    slides = read_manifest(str(tmp_path / "manifest.csv"), store)
    catalog = build_catalog(slides, store, tissue_config, tmp_path / "catalog", 0, None, journal)
    patches = open_pcam(write_pcam(tmp_path / "pcam"), PublicConfig("pcam", "any", 0.972))
    whole = corpus_of_catalog(catalog, None)
    assert whole.corpora == ("CAMELYON16",) and whole.patient_ids == {"P-tumor_001", "P-normal_002"}
    assert [(leak.role, leak.images) for leak in find_leaks(patches, whole)] == [("train", 3), ("select", 3)]
    part = corpus_of_catalog(catalog, [catalog.row("normal_002")])
    assert [(leak.role, leak.slides) for leak in find_leaks(patches, part)] == [("select", ("camelyon16_train_normal_002",))]
    assert trained_on({"recipe": {"facts": {"catalog": catalog.hash}}}, catalog.hash) and not trained_on({}, catalog.hash)


@pytest.mark.parametrize("name, corpora", [
    ("hf:kaiko-ai/midnight", ("TCGA",)), ("hf:owkin/phikon-v2", ("TCGA",)), ("timm:vit_small_patch16_224.lunit_dino", ("TCGA",)),
    ("hf-hub:bioptimus/H0-mini", ("TCGA",)), ("hf:bioptimus/H-optimus-0", ()), ("hf:MahmoodLab/UNI2-h", ()),
    ("hf:paige-ai/Virchow2", ()), ("GPFM", ("TCGA", "CAMELYON", "PANDA")), ("timm:vit_small_patch14_dinov2.lvd142m", None),
    ("unified_vit", None), ("runs/release", None),
])  # fmt: skip
def test_corpora_of_published_encoders(name: str, corpora: tuple[str, ...] | None) -> None:
    assert published_corpora(name) == corpora


def test_the_registry_needs_no_ids() -> None:
    assert shared_sources("crc", ("TCGA",)) == ["leakage: crc (report) is made of TCGA, and the encoder was pretrained on TCGA"]
    assert "Camelyon16, and the encoder was pretrained on CAMELYON" in shared_sources("pcam_10shot", ("CAMELYON", "TCGA"))[0]
    assert shared_sources("tp53", ("TCGA-PRAD",)) and shared_sources("pcam", ("Camelyon17",))
    assert not shared_sources("bach", ("TCGA",)) and not shared_sources("pcam", ("TCGA",)) and not shared_sources("crc", ())
    assert recorded_corpora({"corpora": ["TCGA"]}) == ("TCGA",) == recorded_corpora({"data": {"corpora": "TCGA"}})
    assert recorded_corpora({"data": None}) == () == recorded_corpora({})


def test_equal_pixels_in_two_roles() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    pixels[4], pixels[5], pixels[2] = pixels[0], pixels[1], pixels[1]
    roles = np.array(["train", "train", "train", "report", "report", ""])
    hashes = [pixel_hash(image) for image in pixels]
    assert duplicates(hashes, roles) == [Duplicate((0, 4), ("train", "report"))]  # 1 and 2 are of one role, 5 of none
    flat = np.zeros((3, 2, 8), np.uint8)
    assert pixel_hash(flat) != pixel_hash(flat.reshape(3, 8, 2))  # the shape counts
    assert pixel_hash(pixels[0][:, ::-1]) == pixel_hash(pixels[0][:, ::-1].copy())
