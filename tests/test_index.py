"""`histoscale index`: the seven real slides, and every bad slide with its reason."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from histoscale.data.catalog import open_catalog
from histoscale.data.index import build_catalog, examine
from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.manifest import Slide, read_manifest
from histoscale.data.storage import StorageConfig, StorageError, Store
from histoscale.data.tissue import TissueConfig
from histoscale.launch.index import Config, run, table

MakeSlide = Callable[..., Path]


def manifest(path: Path, rows: list[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_the_seven_real_slides(tmp_path: Path, shared_data: Path, store: Store, tissue_config: TissueConfig) -> None:
    folder = shared_data / "slides"
    names = {
        "cmu1": "svs/CMU-1-Small-Region.svs", "tcga": "svs/tcga-cr-7395-01a-01-ts1.svs", "cmu0": "tiff/CMU-0-small.tiff",
        "dicom": "dicom/CMU-1-Small-Region-wsidicomizer", "ome": "ome-tiff/OS-1-detail.ome.tif",
        "dapi": "ndpi/hamamatsu-DAPI-387.ndpi", "camelyon": "dicom/camelyon16-lowres-jpeg.dcm",
    }  # fmt: skip
    rows = [{"slide_id": k, "uri": str(folder / v), "mpp": "0.25" if k == "tcga" else ""} for k, v in names.items()]
    logging = JournalConfig("off", 10, "off", "test", False)
    out = tmp_path / "catalog"
    config = Config(manifest(tmp_path / "slides.csv", rows), tissue_config, None, store.config, 0, 2, 400, str(out), logging)
    summary = run(config, Journal(out, logging))["index"]
    assert (summary["accepted"], summary["rejected"]) == (5, 2)
    assert summary["rejected_by_reason"] == {"no bright-field tissue": 1, "absurd mpp": 1}
    catalog = open_catalog(str(out), store)
    assert [slide.slide_id for slide in catalog.slides] == ["cmu0", "cmu1", "dicom", "ome", "tcga"]
    assert {found.slide_id: found.reason[:10] for found in catalog.rejected} == {"camelyon": "absurd mpp", "dapi": "no bright-"}
    assert "28.9685 µm/px" in table(catalog)
    for i, slide in enumerate(catalog.slides):
        assert slide.mpp == catalog.level_mpps(i)[0]
        level = catalog.layout(i).levels[0]
        pixels = catalog.reader(i, store).region(0, level.width // 2, level.height // 2, 64, 64)
        assert pixels.shape == (64, 64, 3) and pixels.std() > 0


def test_every_bad_slide_is_rejected_with_its_reason(
    tmp_path: Path, store: Store, tissue_config: TissueConfig, make_slide: MakeSlide, journal: Journal
) -> None:
    good = make_slide(tmp_path / "good.svs")
    whole = good.read_bytes()
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("not a slide")
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 2])
    make_slide(tmp_path / "blank.svs", pixels=np.full((900, 1100, 3), 244, np.uint8))
    make_slide(tmp_path / "no_mpp.svs", mpp=None)
    make_slide(tmp_path / "unit.tif", kind="generic", mpp=350.0)
    expected = {
        "missing": "missing", "empty": "unreadable: the file is empty", "text": "unreadable: OpenSlide", "cut": "unreadable",
        "blank": "no tissue", "no_mpp": "no mpp", "unit": "absurd mpp: 350", "zero": "absurd mpp: 0 ",
        "thousand": "absurd mpp: 1000 ",
    }  # fmt: skip
    rows = [{"slide_id": "good", "uri": "good.svs", "mpp": ""}]
    for name in expected:
        uri = {"unit": "unit.tif", "zero": "good.svs", "thousand": "good.svs"}.get(name, f"{name}.svs")
        rows.append({"slide_id": name, "uri": uri, "mpp": {"zero": "0", "thousand": "1000"}.get(name, "")})
    slides = read_manifest(manifest(tmp_path / "slides.csv", rows), store)
    catalog = build_catalog(slides, store, tissue_config, journal.out, 0, None, journal)
    assert [slide.slide_id for slide in catalog.slides] == ["good"]
    reasons = {found.slide_id: found.reason for found in catalog.rejected}
    assert reasons.keys() == expected.keys()
    for name, start in expected.items():
        assert reasons[name].startswith(start), (name, reasons[name])


def test_the_manifest_overrides_the_header(
    tmp_path: Path, store: Store, tissue_config: TissueConfig, make_slide: MakeSlide
) -> None:
    uri = str(make_slide(tmp_path / "a.svs", mpp=0.5))
    slide = Slide("a", uri, None, None, None, None, None, 0.25, "own", None, None, {})
    found = examine(slide, store, tissue_config)
    assert (found.slide.mpp, found.slide.scanner, found.slide.objective) == (0.25, "own", 20.0)  # type: ignore[union-attr]
    assert found.layout.mpp == 0.5  # type: ignore[union-attr]


def test_one_damaged_tile_does_not_cost_the_slide(
    tmp_path: Path, store: Store, tissue_config: TissueConfig, make_slide: MakeSlide
) -> None:
    path = make_slide(tmp_path / "a.svs", downsamples=(1,))
    slide = Slide("a", str(path), None, None, None, None, None, None, None, None, None, {})
    level = examine(slide, store, tissue_config).layout.levels[0]  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[int(level.offsets[6]) : int(level.offsets[6] + level.counts[6])] = bytes(int(level.counts[6]))
    path.write_bytes(data)
    assert examine(slide, store, tissue_config).slide.slide_id == "a"  # type: ignore[union-attr]
    for offset, count in zip(level.offsets, level.counts, strict=True):
        data[int(offset) : int(offset + count)] = bytes(int(count))
    path.write_bytes(data)
    assert examine(slide, store, tissue_config).reason.startswith("undecodable")  # type: ignore[union-attr]


def test_a_store_that_fails_stops_the_run(tmp_path: Path, tissue_config: TissueConfig, journal: Journal) -> None:
    """An outage must not be written down as bad slides."""
    store = Store(StorageConfig({}, "fsspec", str(tmp_path), 1 << 20, 1.0, 1.0, 60.0))
    slide = Slide("a", "http://127.0.0.1:9/a.svs", None, None, None, None, None, None, None, None, None, {})
    with pytest.raises(StorageError, match="127.0.0.1:9/a.svs could not be read"):
        build_catalog([slide], store, tissue_config, journal.out, 0, None, journal)
    assert not (journal.out / "catalog.json").exists()


def test_not_one_slide_is_an_error(tmp_path: Path, store: Store, tissue_config: TissueConfig) -> None:
    path = manifest(tmp_path / "slides.csv", [{"slide_id": "a", "uri": "none.svs"}])
    logging = JournalConfig("off", 10, "off", "test", False)
    config = Config(path, tissue_config, None, store.config, 0, 2, 400, str(tmp_path / "out"), logging)
    with pytest.raises(ValueError, match="none of the 1 slides"):
        run(config, Journal(tmp_path / "out", logging))


def test_worker_processes_make_the_same_catalog(
    tmp_path: Path, store: Store, tissue_config: TissueConfig, make_slide: MakeSlide, journal: Journal
) -> None:
    rows = [{"slide_id": f"s{i}", "uri": str(make_slide(tmp_path / f"s{i}.svs", seed=i))} for i in range(4)]
    slides = read_manifest(manifest(tmp_path / "slides.csv", rows), store)
    alone = build_catalog(slides, store, tissue_config, tmp_path, 0, None, journal)
    many = build_catalog(slides[::-1], store, tissue_config, journal.out, 2, None, journal)
    assert many.hash == alone.hash and len(many) == 4
