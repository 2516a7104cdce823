"""The parsers of eval/ and launch/ that read what others made: what each may raise, and what a right result is."""

import gzip
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from fuzz.engine import Target
from safetensors.numpy import save
from store_layouts import grid, write_clam, write_trident

from histoscale.data import fingerprint
from histoscale.data.cohort.truth import _asap, _geojson
from histoscale.data.journal import keep_rows
from histoscale.data.jsonfiles import JsonError, read_rows
from histoscale.data.spreadsheet import meant, read_table, shown, write_table
from histoscale.eval.annotations import AnnotationError, coverage, read_annotations
from histoscale.eval.datasets.download import FetchError
from histoscale.eval.datasets.patches import DatasetError
from histoscale.eval.datasets.polygons import read_polygons
from histoscale.eval.datasets.unpack import Damaged, gunzip, unzip
from histoscale.eval.evidence.verdicts import VERDICTS, VerdictError, read_verdicts
from histoscale.eval.mil.folder import read_folder
from histoscale.eval.predictions import Predictions, PredictionsError, load_predictions, save_predictions
from histoscale.eval.results import Outcome
from histoscale.eval.stores import (
    StoreConfig,
    StoreError,
    matches,
    open_store,
    read_attribute,
    read_coords,
    read_features,
    write_store,
)
from histoscale.eval.stores import (
    read_rows as read_tiles,
)
from histoscale.launch import index as index_command
from histoscale.launch.held import Asked, Refused, begin, difference, finished, is_bound, read_state
from histoscale.pretrain.tensorfile import TensorFileError, read_wholes, weights_digest

CUT = b"\n8<\n"  # between the files of one input
MOST = 1 << 20
JSON = [b"null", b"[]", b"{}", b"1e999", b"NaN", b'""', b"[[[[", b'{"a":', b"-1", b'"\\ud800"', b"true"]


def targets(folder: Path) -> dict[str, Target]:
    """Every such parser, with files below `folder`."""
    return {
        **_outlines(folder),
        "store": _store(folder),
        "header": _header(folder),
        **_archives(folder),
        **_records(folder),
        "predictions": _predictions(folder),
        "cells": _cells(folder),
    }


def _outlines(folder: Path) -> dict[str, Target]:
    square, hole = [[0, 0], [90, 0], [90, 80.5], [0, 80]], [[10, 10], [20, 10], [20, 20]]
    properties = {"classification": {"name": "tumour", "color": [200, 0, 0]}}
    shapes = [{"type": "Polygon", "coordinates": [square, hole]}, {"type": "MultiPolygon", "coordinates": [[square], [hole]]},
              {"type": "Point", "coordinates": [5, 5]}]  # fmt: skip
    features = [{"type": "Feature", "geometry": shape, "properties": properties} for shape in shapes]
    rings = [np.array(square, float), np.array(hole, float)]
    coords = np.array([[0, 0], [64, 0], [0, 64], [900, 900]])

    def reads(name: str) -> Callable[[bytes], None]:
        path = folder / name

        def call(data: bytes) -> None:
            path.write_bytes(data)
            shares = coverage(coords, 64, read_annotations(path, ["Exclusion"]))
            assert ((shares >= 0) & (shares <= 1)).all()

        return call

    def aperio(data: bytes) -> None:
        (folder / "aperio.xml").write_bytes(data)
        assert all(np.isfinite(vertices).all() for _, vertices in read_polygons(folder / "aperio.xml"))

    geojson = [json.dumps({"type": "FeatureCollection", "features": features}).encode(), json.dumps(features).encode(),
               json.dumps(_geojson(rings)).encode()]  # fmt: skip
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in square)
    regions = f'<Region Id="1"><Vertices>{vertices}</Vertices></Region>'
    slide = f'<Annotations><Annotation><Attributes><Attribute Name="Epithelial"/></Attributes><Regions>{regions}</Regions>'
    words = [b"<a>", b"&#0;", b"<!DOCTYPE x [", b'<!ENTITY e "y">', b"&e;", b'Order="', b'X="nan"', b"<Coordinate", b"1e999"]
    return {
        "geojson": Target(geojson, reads("a.geojson"), (AnnotationError,), JSON),
        "asap": Target([_asap(rings)], reads("a.xml"), (AnnotationError,), words),
        "aperio": Target([f"{slide}</Annotation></Annotations>".encode()], aperio, (DatasetError,), words),
    }


def _store(folder: Path) -> Target:
    path, features = folder / "slide.h5", np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    attrs = {"slide_id": "slide", "encoder_hash": "e1", "mpp": 0.5, "patch_size": 32, "level0_mpp": 0.26}
    seeds = []
    write_store(path, features, grid(20, 62), attrs, StoreConfig("fp16"))
    seeds.append(path.read_bytes())
    write_trident(path, features, 64)
    seeds.append(path.read_bytes())
    write_clam(path, features, 64)
    seeds.append(path.read_bytes())

    def call(data: bytes) -> None:
        path.write_bytes(data)
        found = open_store(path)
        whole = read_features(path)
        assert whole.shape == (found.tiles, found.width) and np.isfinite(whole).all()
        assert read_coords(path).shape == (found.tiles, 2)
        assert read_tiles(path, np.array([0])).shape == (1, found.width)
        matches(path, attrs)
        read_attribute(path, "encoder_hash")

    return Target(seeds, _but(call, "encoder_hash"), (StoreError,), [b"features", b"coords", b"TREE", b"SNOD", b"OHDR", b"HEAP"])


def _but(call: Callable[[bytes], None], absent: str) -> Callable[[bytes], None]:
    """The call, where other tools' stores may lack an attribute of ours."""

    def without(data: bytes) -> None:
        try:
            call(data)
        except StoreError as error:
            if absent not in str(error):
                raise

    return without


def _header(folder: Path) -> Target:
    path = folder / "header.safetensors"
    sharding = {name: {"saved_offsets": [2] if name == "b" else []} for name in ("a", "b")}
    made = {"b": np.arange(4, dtype=np.float32), "a": np.array(1, np.int64)}
    seeds = [save(made), save({"b": made["b"]}, {"format": "pt"}), save(made, {"DCP_SHARDING_INFO": json.dumps(sharding)})]
    seeds[2] = seeds[2].replace(b"[2]", b"[0]")

    def call(data: bytes) -> None:
        path.write_bytes(data)
        assert len(weights_digest(read_wholes([path]))) == 64

    words = [*JSON, b'"F4"', b'"dtype":"F32"', b'"shape":[', b'"data_offsets":[0,', b"saved_offsets"]
    return Target(seeds, call, (TensorFileError,), words)


def _archives(folder: Path) -> dict[str, Target]:
    inside = folder / "archives"
    inside.mkdir()
    archive, made = inside / "x.zip", inside / "x"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, text in {"x/1.csv": b"1,2\n" * 50, "x/a/2.csv": b"3"}.items():
            zipped.writestr(zipfile.ZipInfo(name, (2018, 4, 7, 12, 0, 0)), text, zipfile.ZIP_DEFLATED)

    def unpacked(data: bytes) -> None:
        archive.write_bytes(data)
        try:
            files, total = unzip(archive, made, MOST)
            there = [path for path in made.rglob("*") if path.is_file() and not path.is_symlink()]
            assert len(there) == files and sum(path.stat().st_size for path in there) == total <= MOST
        finally:
            assert {path.name for path in inside.iterdir()} <= {"x", "x.zip"}
            shutil.rmtree(made, ignore_errors=True)

    def gunzipped(data: bytes) -> None:
        archive.write_bytes(data)
        gunzip(archive, made, MOST)
        assert made.stat().st_size <= MOST
        made.unlink()

    words = [b"../", b"/", b"x/", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\0\0\0\0", b"\xff\xff\xff\xff"]
    return {
        "zip": Target([buffer.getvalue()], unpacked, (FetchError, Damaged), words),
        "gzip": Target([gzip.compress(b"1,2\n" * 50, mtime=1)], gunzipped, (FetchError, Damaged), [b"\x1f\x8b\x08\0"]),
    }


def _records(folder: Path) -> dict[str, Target]:
    """What runs leave: states, summaries, rows, lists of inputs, verdicts."""
    out = folder / "out"
    out.mkdir()
    asked = Asked("index", index_command, {"manifest": "m.csv"}, {}, {"manifest": "0"}, fingerprint.Noted({}, {}))

    def state(data: bytes) -> None:
        text, _, summary = data.partition(CUT)
        (out / "state.json").write_bytes(text.replace(b"SHA256", hashlib.sha256(summary).hexdigest().encode()))
        (out / "summary.json").write_bytes(summary)
        found = read_state(out)
        if found is not None:
            difference(out, asked, found)
            if found["status"] == "done":
                assert isinstance(finished(out, found), dict)
            elif not is_bound(out, found, asked):
                begin(out, asked, found)

    def embedded(data: bytes) -> None:
        text, _, summary = data.partition(CUT)
        (out / "state.json").write_bytes(text)
        (out / "summary.json").write_bytes(summary)
        assert isinstance(read_folder(out).absent("a"), str)

    def rows(data: bytes) -> None:
        path = out / "metrics.jsonl"
        path.write_bytes(data)
        keep_rows(path, lambda row: row.get("step") != 3)
        assert all(row.get("step") != 3 for row in read_rows(path))

    def inputs(data: bytes) -> None:
        (out / "inputs.jsonl").write_bytes(data)
        assert all(isinstance(text, str) for pair in fingerprint.load(out / "inputs.jsonl").items() for text in pair)

    def verdict(data: bytes) -> None:
        (out / "verdicts").mkdir(exist_ok=True)
        (out / "verdicts/a.json").write_bytes(data)
        assert all(one.verdict in VERDICTS and np.isfinite(one.value) for one in read_verdicts(out / "verdicts"))

    said = {"command": "index", "identity": "1", "status": "done", "bound": True, "found": [], "result": {"manifest": "n.csv"},
            "facts": {}, "summary": "SHA256"}  # fmt: skip
    done, running = (json.dumps({**said, "status": status, "bound": status == "done"}).encode() for status in ("done", "failed"))
    about = json.dumps({"command": "embed", "status": "running"}).encode() + CUT + b'{"embed": {"failed": {"a": "damaged"}}}'
    answer = {"format": "histoscale-verdict-1", "slide_id": "a", "task": "t", "value": 0.5, "flagged": True, "verdict": "agree",
              "comment": "", "reader": "r", "date": "2026-01-01"}  # fmt: skip
    listed = b'["manifest", "00ff"]\n["/m.csv", [1, 2, 3, 4], "00ff"]\n'
    return {
        "state": Target([done + CUT + b'{"index": {}}', running + CUT], state, (Refused,), JSON),
        "embedded": Target([about], embedded, (StoreError,), JSON),
        "rows": Target([b'{"step": 1, "loss": 2.5}\n{"step": 3}\n'], rows, (JsonError,), JSON),
        "inputs": Target([listed], inputs, (), JSON),
        "verdict": Target([json.dumps(answer).encode()], verdict, (VerdictError,), JSON),
    }


def _predictions(folder: Path) -> Target:
    path = folder / "predictions.npz"
    logs = np.log(np.full((1, 4, 2), 0.5))
    outcome = Outcome("e", "cls", "honest", "linear", "report", logs, np.arange(4), "")
    names = np.array(["p", "q", "r", "s"])
    whole = Predictions("set", "0", ("a", "b"), "patient", None, {"e": "1"}, np.array([0, 1, 0, 1]), names, names,
                        {"native": [outcome]}, ())  # fmt: skip
    save_predictions(path, whole)
    seeds = [path.read_bytes()]
    with np.load(path) as held:
        arrays = dict(held)
    np.savez(path, **arrays)  # uncompressed, so that changes reach the arrays
    seeds.append(path.read_bytes())

    def call(data: bytes) -> None:
        path.write_bytes(data)
        asdict(load_predictions(path))

    return Target(
        seeds, call, (PredictionsError,), [*JSON, b"\x93NUMPY", b"'descr': '|O'", b"'shape': (99999999999,)", b"PK\x01\x02"]
    )


def _cells(folder: Path) -> Target:
    path = folder / "cells.csv"

    def call(data: bytes) -> None:
        text = data.decode("utf-8", "ignore").replace("\0", "")[:100_000]  # as much as Python's reader takes
        write_table(path, ["slide_id", "label"], [{"slide_id": text, "label": -0.5}])
        assert read_table(path) == [{"slide_id": text, "label": "-0.5"}] and meant(shown(text)) == text
        assert text[:1] not in ("=", "@", "\t", "\r", "+", "-") or shown(text)[0] == "'" or float(text) is not None

    return Target(
        [b"=1+1", b"a,b", b'"x"\n'], call, (), [b"'", b"=", b"+", b"-", b"@", b"\t", b"\r", b"\xef\xbc\x9d", b" ", b'"']
    )
