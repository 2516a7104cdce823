"""Fetching from a real server through a proxy that cuts, corrupts and refuses: whole files of the right bytes, or a sentence."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from set_fixtures import write_crc, write_pcam

from histoscale.data.journal import Journal
from histoscale.eval.datasets import sources
from histoscale.eval.datasets.crc import open_crc
from histoscale.eval.datasets.download import FetchError, Patience, download
from histoscale.eval.datasets.fetch import FetchConfig, Fetched, fetch_set, origin_of
from histoscale.eval.datasets.pcam import open_pcam
from histoscale.eval.datasets.public import PublicConfig
from histoscale.eval.datasets.sources import ORIGINS, Origin, Source
from histoscale.eval.datasets.unpack import Damaged, gunzip, unzip
from histoscale.launch.config import ConfigError
from histoscale.launch.loopback import Proxy, Server, proxy
from histoscale.launch.run import execute, invoke

CONFIG = FetchConfig(request_timeout_s=5, deadline_s=20, attempts=2, keep_archives=False)
SHORT = Patience(request_timeout_s=0.5, deadline_s=1.0)
BYTES = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8).tobytes()


@pytest.fixture(scope="module")
def faults(folder_server: tuple[Server, Path]) -> Iterator[Proxy]:
    with proxy(folder_server[0]) as found:
        yield found


@pytest.fixture
def served(folder_server: tuple[Server, Path], faults: Proxy, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL through the proxy, folder that it serves)."""
    folder = folder_server[1] / tmp_path.name
    folder.mkdir()
    faults.set()
    yield f"{faults.url}/{tmp_path.name}", folder
    faults.set()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def publish(folder: Path, name: str, kind: str, data: bytes, md5_of: str = "both", most: int = 64 << 20) -> Source:
    """Puts a file there; gz: `data` packed; zip: `data` is the archive."""
    packed = gzip.compress(data, mtime=1_500_000_000) if kind == "gz" else data
    (folder / name).write_bytes(packed)
    makes = name.removesuffix(".gz").removesuffix(".zip")
    checks = md5(packed) if md5_of in ("both", "source") else None, md5(data) if md5_of in ("both", "made") else None
    return Source(name, kind, makes, checks[0], checks[1] if kind == "gz" else None, most)


def fetched(url: str, root: Path, journal: Journal, *files: Source, **changes: object) -> dict[str, Fetched]:
    config = FetchConfig(**{**vars(CONFIG), **changes})  # type: ignore[arg-type]
    return fetch_set(Origin("CC0", "", files, ""), root, url, config, journal)


def test_a_cut_line_goes_on_from_where_it_was_cut(
    served: tuple[str, Path], faults: Proxy, tmp_path: Path, journal: Journal
) -> None:
    url, folder = served
    (folder / "x.bin").write_bytes(BYTES)
    faults.set(cut=0.7, seed=1)
    before = faults.counts()
    download(f"{url}/x.bin", tmp_path / "x.bin", 1 << 30, Patience(5, 60), journal)
    after = faults.counts()
    assert (tmp_path / "x.bin").read_bytes() == BYTES and not list(tmp_path.glob("x.bin.partial*"))
    assert after["cut"] > before["cut"], "the proxy cut nothing, so nothing was tested"
    assert after["bytes"] - before["bytes"] <= 3 * len(BYTES)  # the proxy counts whole replies; each begins where the last ended


def test_a_killed_download_goes_on(served: tuple[str, Path], faults: Proxy, tmp_path: Path, journal: Journal) -> None:
    """What is on the disk is not asked for again: the proxy passes no more than the rest."""
    url, folder = served
    (folder / "x.bin").write_bytes(BYTES)
    with pytest.raises(FetchError, match="no new byte in 1 s, .* bytes are here .*; the same command goes on from there"):
        faults.set(cut=1.0)
        _stop_after_one_cut(f"{url}/x.bin", tmp_path, faults, journal)
    held = (tmp_path / "x.bin.partial").stat().st_size
    assert len(BYTES) // 2 <= held < len(BYTES)
    faults.set()
    before = faults.counts()["bytes"]
    download(f"{url}/x.bin", tmp_path / "x.bin", 1 << 30, SHORT, journal)
    assert (tmp_path / "x.bin").read_bytes() == BYTES and faults.counts()["bytes"] - before == len(BYTES) - held


def _stop_after_one_cut(url: str, root: Path, faults: Proxy, journal: Journal) -> None:
    """Half a file, as a killed process leaves it, then a server that refuses every connection."""
    code = (
        "import sys, os; from pathlib import Path; from histoscale.eval.datasets import download as d; "
        "from histoscale.data.journal import Journal, JournalConfig; d.time.sleep = lambda s: os._exit(9); "
        "j = Journal(Path(sys.argv[2]) / 'j', JournalConfig('off', 1, 'off', 't', False)); "
        "d.download(sys.argv[1], Path(sys.argv[2]) / 'x.bin', 1 << 30, d.Patience(5, 60), j)"
    )
    assert subprocess.run([sys.executable, "-c", code, url, str(root)]).returncode == 9
    faults.set(throttle=1.0, status=503)
    download(url, root / "x.bin", 1 << 30, SHORT, journal)


@pytest.mark.parametrize("fault, words", [
    ({"throttle": 1.0, "status": 503}, r"no new byte in 1 s, 0 bytes are here \(status 503\)"),
    ({"stall": 1.0}, "no new byte in 1 s"),
    ({"refuse": 1.0}, "answers 403 .*: expected the file; is mirror= right"),
])  # fmt: skip
def test_a_server_that_does_not_give_is_named(
    served: tuple[str, Path], faults: Proxy, tmp_path: Path, journal: Journal, fault: dict[str, float], words: str
) -> None:
    url, folder = served
    (folder / "x.bin").write_bytes(BYTES)
    faults.set(**fault)
    with pytest.raises(FetchError, match=words) as error:
        download(f"{url}/x.bin", tmp_path / "x.bin", 1 << 30, SHORT, journal)
    assert "\n" not in str(error.value) and url in str(error.value) and not (tmp_path / "x.bin").exists()


def test_what_is_not_the_published_file_is_not_begun(served: tuple[str, Path], tmp_path: Path, journal: Journal) -> None:
    url, folder = served
    (folder / "x.bin").write_bytes(BYTES)
    for name, most, words in (("none.bin", 1 << 30, "answers 404"), ("x.bin", 1000, "announces 3145728 bytes: expected at most")):
        with pytest.raises(FetchError, match=words):
            download(f"{url}/{name}", tmp_path / name, most, SHORT, journal)
    with pytest.raises(FetchError, match="none of http or https"):
        download(f"file://{folder}/x.bin", tmp_path / "x.bin", 1 << 30, SHORT, journal)
    assert not (tmp_path / "x.bin").exists()


def test_another_file_at_the_server_is_begun_anew(
    served: tuple[str, Path], faults: Proxy, tmp_path: Path, journal: Journal
) -> None:
    """A part of yesterday's file is never completed with today's: not with another ETag, not with a shorter file."""
    url, folder = served
    for data in (BYTES[::-1], BYTES[:1000]):
        (folder / "x.bin").write_bytes(BYTES)
        (tmp_path / "x.bin.partial").unlink(missing_ok=True)
        faults.set(cut=1.0)
        with pytest.raises(FetchError):
            _stop_after_one_cut(f"{url}/x.bin", tmp_path, faults, journal)
        (folder / "x.bin").write_bytes(data)
        os.utime(folder / "x.bin", (1, 1))
        faults.set()
        download(f"{url}/x.bin", tmp_path / "x.bin", 1 << 30, SHORT, journal)
        assert (tmp_path / "x.bin").read_bytes() == data


def test_a_part_of_unknown_origin_is_not_trusted(served: tuple[str, Path], tmp_path: Path, journal: Journal) -> None:
    url, folder = served
    (folder / "x.bin").write_bytes(BYTES)
    for about in (None, "{", '{"etag": "other", "size": 3145728}'):
        (tmp_path / "x.bin.partial").write_bytes(b"z" * 100)
        (tmp_path / "x.bin.partial.json").unlink(missing_ok=True)
        if about is not None:
            (tmp_path / "x.bin.partial.json").write_text(about)
        download(f"{url}/x.bin", tmp_path / "x.bin", 1 << 30, SHORT, journal)
        assert (tmp_path / "x.bin").read_bytes() == BYTES


def test_a_server_without_ranges_begins_anew(tmp_path: Path, journal: Journal) -> None:
    """It answers 200 to a range: the part that is here must not stand before the whole file."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served/x.bin").write_bytes(BYTES)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "x.bin.partial").write_bytes(BYTES[:1000])
        (tmp_path / "x.bin.partial.json").write_text(json.dumps({"etag": "", "size": len(BYTES)}))
        download(f"http://127.0.0.1:{server.server_port}/x.bin", tmp_path / "x.bin", 1 << 30, SHORT, journal)
        server.shutdown()
    assert (tmp_path / "x.bin").read_bytes() == BYTES


@pytest.mark.parametrize("kind", ["file", "gz", "zip"])
def test_corrupted_bytes_are_never_kept(
    served: tuple[str, Path], faults: Proxy, tmp_path: Path, journal: Journal, kind: str
) -> None:
    url, folder = served
    data = zipped({"x/1.bin": BYTES}) if kind == "zip" else BYTES
    name = {"file": "x", "gz": "x.gz", "zip": "x.zip"}[kind]
    checks = {"file": "source", "gz": "made", "zip": "none"}[kind]  # by an md5, by one after unpacking, by the archive itself
    source = publish(folder, name, kind, data, checks)
    faults.set(corrupt=1.0)
    words = "has the md5 .*: expected|is no whole (zip|gzip) file"
    with pytest.raises(FetchError, match=f"{name} ({words}).*so it was in 2 downloads"):
        fetched(url, tmp_path / "root", journal, source)
    assert {path.name for path in (tmp_path / "root").iterdir()} <= {".fetch.lock"}
    faults.set()
    made = fetched(url, tmp_path / "root", journal, source)["x"]
    assert made.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest() and made.checked == (kind != "zip")
    held = (tmp_path / "root/x/1.bin" if kind == "zip" else tmp_path / "root/x").read_bytes()
    assert held == BYTES and not list((tmp_path / "root").glob("*.zip")) + list((tmp_path / "root").glob("*.gz"))


def zipped(files: dict[str, bytes], **attributes: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (2018, 4, 7, 12, 0, 0))
            entry.external_attr = attributes.get("mode", 0o100644) << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


@pytest.mark.parametrize("files, mode, words", [
    ({"x/1": b"1", "../out": b"2"}, 0o100644, "holds '../out': expected plain files in x/ alone"),
    ({"/out": b"2"}, 0o100644, "holds '/out'"),
    ({"x/../../out": b"2"}, 0o100644, "expected plain files in x/ alone"),
    ({"x\\..\\out": b"2"}, 0o100644, "expected plain files in x/ alone"),
    ({"y/1": b"2"}, 0o100644, "holds 'y/1'"),
    ({"x/link": b"/etc/passwd"}, 0o120777, "holds 'x/link'"),
    ({"x": b"2"}, 0o100644, "twice or as a file"),
    ({"x/1": bytes(2 << 20)}, 0o100644, "unpacks to 2097152 bytes: expected some and at most 1048576"),
    ({"__MACOSX/x": b""}, 0o100644, "unpacks to 0 bytes"),
])  # fmt: skip
def test_an_archive_that_is_no_data_set_is_not_unpacked(tmp_path: Path, files: dict[str, bytes], mode: int, words: str) -> None:
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in/x.zip"
    archive.write_bytes(zipped(files, mode=mode))
    with pytest.raises(FetchError, match=words):
        unzip(archive, tmp_path / "in/x", 1 << 20)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.zip"]


def damaged(change: Callable[[bytearray, int], None]) -> bytes:
    """A zip of x/1 and x/2 whose directory was changed: `change` gets the bytes and where the first entry begins there."""
    data = bytearray(zipped({"x/1": b"1" * 400, "x/2": b"2"}))
    change(data, data.index(b"PK\x01\x02"))
    return bytes(data)


def says(at: int, value: bytes) -> Callable[[bytearray, int], None]:
    def change(data: bytearray, entry: int) -> None:
        data[entry + at : entry + at + len(value)] = value

    return change


@pytest.mark.parametrize("change, error, words", [
    (says(24, (900).to_bytes(4, "little")), Damaged, "has 400 bytes, not 900 as it says"),
    (says(24, (4).to_bytes(4, "little")), Damaged, "Bad CRC-32"),
    (says(42, b"\xff\xff\xff\x7f"), Damaged, "is no whole zip file|lies outside of it"),
    (says(42, b"\xf0\xff\xff\xff"), Damaged, "is no whole zip file|lies outside of it"),
    (says(10, (14).to_bytes(2, "little")), FetchError, "expected plain files"),  # LZMA, which is unpacked in one piece
    (says(8, (1).to_bytes(2, "little")), FetchError, "expected plain files"),  # encrypted
    (says(46, b"x/\n"), FetchError, "expected plain files"),
])  # fmt: skip
def test_a_directory_that_lies_is_named_and_nothing_stays(
    tmp_path: Path, change: Callable[[bytearray, int], None], error: type[Exception], words: str
) -> None:
    (tmp_path / "x.zip").write_bytes(damaged(change))
    with pytest.raises(error, match=words) as caught:
        unzip(tmp_path / "x.zip", tmp_path / "x", 1 << 20)
    assert "x.zip" in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize("files, words", [
    ({"x/a": b"1", "x/a/b": b"2"}, "holds 'x/a' as a file and as a folder"),
    ({f"x/{i}": b"" for i in range(5000)}, "holds 5000 files: expected at most 4096"),
    ({f"x/{'n' * 300}": b"1"}, "expected plain files"),
])  # fmt: skip
def test_names_that_no_disk_takes_are_refused_before_a_write(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    (tmp_path / "x.zip").write_bytes(zipped(files))
    with pytest.raises(FetchError, match=words):
        unzip(tmp_path / "x.zip", tmp_path / "x", 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_zip_without_dates_is_unpacked(tmp_path: Path) -> None:
    """Some programs write zeros: the month 0."""
    data = damaged(says(12, bytes(4)))
    (tmp_path / "x.zip").write_bytes(data)
    assert unzip(tmp_path / "x.zip", tmp_path / "x", 1 << 20) == (2, 401)
    assert (tmp_path / "x/2").read_bytes() == b"2"


def test_a_gzip_that_unpacks_to_too_much_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(FetchError, match="unpacks to more than the 1048576 bytes"):
        gunzip(tmp_path / "x.gz", tmp_path / "x", 1 << 20)
    (tmp_path / "x.gz").write_bytes(gzip.compress(BYTES)[:-1000])
    with pytest.raises(Damaged):
        gunzip(tmp_path / "x.gz", tmp_path / "x", 1 << 30)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gz"]


def test_what_is_there_is_not_fetched_again(served: tuple[str, Path], faults: Proxy, tmp_path: Path, journal: Journal) -> None:
    url, folder = served
    root = tmp_path / "root"
    files = (publish(folder, "a.gz", "gz", BYTES, "made"), publish(folder, "t.csv", "file", b"1,2\n", "none"),
             publish(folder, "z.zip", "zip", zipped({"z/1": b"1", "z/b/2": b"2"})))  # fmt: skip
    first = fetched(url, root, journal, *files)
    assert [made.checked for made in first.values()] == [True, False, True] and first["z"].files == 2
    assert os.stat(root / "a").st_mtime == 1_500_000_000 and os.stat(root / "z/1").st_mtime == 1_523_102_400
    before = faults.counts()["requests"]
    assert fetched(url, root, journal, *files) == first and faults.counts()["requests"] == before
    (root / "z/1").unlink()
    with pytest.raises(FetchError, match="z holds 1 files of 1 bytes, and 2 of 2 were fetched: move it away"):
        fetched(url, root, journal, *files)
    (root / "z/1").write_bytes(b"1")
    (root / "fetched.json").unlink()
    (root / "a").write_bytes(b"mine")
    with pytest.raises(FetchError, match="a has the md5 .*: expected .*; move it away"):
        fetched(url, root, journal, *files)
    (root / "a").write_bytes(BYTES)
    again = fetched(url, root, journal, *files)  # put there by hand: by checksum where there is one, else unchecked
    assert again["a"].checked and not again["z"].checked and faults.counts()["requests"] == before
    (root / "a").unlink()
    assert fetched(url, root, journal, *files, keep_archives=True)["a"].md5 == first["a"].md5 and (root / "a.gz").is_file()


def test_two_commands_do_not_share_a_folder(served: tuple[str, Path], tmp_path: Path, journal: Journal) -> None:
    import fcntl

    url, folder = served
    source = publish(folder, "a", "file", BYTES)
    (tmp_path / "root").mkdir()
    with (tmp_path / "root/.fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="another command fetches into"):
            fetched(url, tmp_path / "root", journal, source)
    assert fetched(url, tmp_path / "root", journal, source)["a"].total == len(BYTES)


def test_the_command_fetches_sets_that_then_open(
    served: tuple[str, Path], faults: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """PCam as six gz files and three tables, CRC as two zips, over a line that cuts; only the checksums are the fixture's."""
    url, folder = served
    made = write_pcam(tmp_path / "made")
    pcam = [publish(folder, f"{path.name}.gz", "gz", path.read_bytes(), "made") for path in sorted(made.glob("*.h5"))]
    pcam += [publish(folder, path.name, "file", path.read_bytes(), "none") for path in sorted(made.glob("*.csv"))]
    write_crc(tmp_path / "made")
    zips = []
    for name in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"):
        files = sorted((tmp_path / "made" / name).rglob("*.tif"))
        zips.append(publish(folder, f"{name}.zip", "zip", zipped({str(f.relative_to(made)): f.read_bytes() for f in files})))
    monkeypatch.setitem(sources.ORIGINS, "pcam", Origin("CC0", ORIGINS["pcam"].base, tuple(pcam), ""))
    monkeypatch.setitem(sources.ORIGINS, "crc", Origin("CC BY 4.0", ORIGINS["crc"].base, tuple(zips), ""))
    faults.set(cut=0.4, seed=3)
    for name in ("pcam", "crc"):
        keys = [f"dataset={name}", f"data_root={tmp_path / 'root'}", f"mirror={url}", f"out={tmp_path / 'out' / name}"]
        invoke("fetch", [*keys, "logging.progress=lines"])
        told = json.loads((tmp_path / "out" / name / "summary.json").read_text())["fetch"]
        assert told["dataset"] == name and len(told["files"]) == (9 if name == "pcam" else 2)
    assert faults.counts()["cut"] > 0
    assert "no checksum published here, sha256" in (said := capfd.readouterr().err) and "given under CC0" in said
    assert len(open_pcam(tmp_path / "root", PublicConfig("pcam", "any", 0.972))) == 36
    crc = open_crc(tmp_path / "root", PublicConfig("crc", "any", 0.5), 1)
    assert len(crc) == 36
    (tmp_path / "other").mkdir()
    unzip(folder / "NCT-CRC-HE-100K.zip", tmp_path / "other/NCT-CRC-HE-100K", 1 << 20)
    unzip(folder / "CRC-VAL-HE-7K.zip", tmp_path / "other/CRC-VAL-HE-7K", 1 << 20)
    assert open_crc(tmp_path / "other", PublicConfig("crc", "any", 0.5), 1).hash == crc.hash  # one archive, one hash


def test_sets_that_are_not_given_away_say_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("bach", "CC BY-NC-ND 4.0"), ("mhist", "sign the agreement"), ("folder", "nothing to fetch")):
        keys = [f"dataset={name}", f"data_root={tmp_path}/r", f"out={tmp_path}/o-{name}", "logging.progress=off"]
        assert execute("fetch", keys) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1
    with pytest.raises(ConfigError, match="fetch needs data_root="):
        invoke("fetch", ["dataset=pcam"])
    with pytest.raises(FetchError, match="expected crc, crc_nonorm, pcam"):
        origin_of("own")


def test_the_official_table_is_whole() -> None:
    """Every file has a publisher, and room for what its images need: 327,680 tiles of 96 px, 107,180 of 224 px."""
    for name in ("crc", "crc_nonorm", "pcam", "pcam_10shot"):
        origin = origin_of(name)
        assert origin.base.startswith("https://zenodo.org/records/") and all(source.makes for source in origin.files)
        for source in origin.files:
            assert all(check is None or len(check) == 32 for check in (source.md5, source.makes_md5))
    assert sum(source.most_bytes for source in ORIGINS["pcam"].files) > 327_680 * 96 * 96 * 3
    assert sum(source.most_bytes for source in ORIGINS["crc"].files) > 107_180 * 224 * 224 * 3
    unchecked = {s.name for o in ORIGINS.values() for s in o.files if s.md5 is None and s.makes_md5 is None}
    assert unchecked == {
        "NCT-CRC-HE-100K-NONORM.zip",
        *(f"camelyonpatch_level_2_split_{p}_meta.csv" for p in ("train", "valid", "test")),
    }
