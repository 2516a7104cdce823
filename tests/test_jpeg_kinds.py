"""Every kind of JPEG tile, every part of it: the pixels and the verdict of the whole tile, and always an answer.

tests/fuzz/ holds what is compiled here: draw_tiles.c makes a tile of every kind, every_part.c compares all parts of a tile with
the whole tile as libjpeg decodes it, part_fuzz.c does so for any bytes under libFuzzer, and for saved ones under replay.c.
HISTOSCALE_FUZZ_S=600 fuzzes ten minutes.
"""

import io
import os
import re
import shutil
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from test_fuzz_parsers import asked_s

from histoscale.data.pictures import PictureError, pixels_of
from histoscale.data.readers import codec
from histoscale.data.readers.codec import decode_tile
from histoscale.data.readers.pyramid import DecodeError, Level

Draw = Callable[..., dict[str, bytes]]
jpegparts = codec.jpegparts
ROOT = Path(__file__).resolve().parents[1]
FUZZ, READERS = ROOT / "tests/fuzz", ROOT / "data/readers"
DECODER = [READERS / "jpegtile.c", READERS / "jpegscan.c"]
SIDE, REDUCTIONS = 64, (1, 2, 4, 8)
PROVEN = ("1x1_", "2x1_", "1x2_", "2x2_", "4x1_", "grey_")  # samplings that are decoded in parts
NEVER_RETURNED = {2: (0, 0, 1, 13), 4: (0, 0, 1, 5)}  # parts of a progressive tile of 2x4, by scale
ANSWER_S = 60
FUZZ_S = round(asked_s(30.0))
LACKING = "jpeglib.h: No such file|'jpeglib.h' file not found|cannot find .*(libclang_rt|-lasan|-lubsan)"
SANITIZERS = ("-g", "-O1", "-fno-sanitize-recover=all")


def compiled(folder: Path, name: str, *sources: Path, compiler: str = "cc", flags: tuple[str, ...] = ("-O2",)) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"this machine has no {compiler}")
    program = folder / name
    done = subprocess.run([compiler, *flags, "-o", program, *sources, "-ljpeg"], capture_output=True, text=True)
    if lacks := re.search(LACKING, done.stderr):
        pytest.skip(f"{compiler} lacks libjpeg-turbo's headers or its sanitizers: {lacks[0]}")
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="session")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """Tiles of some size, by sampling_kind; `only` the one of that name."""
    if jpegparts is None:
        pytest.skip("jpegparts was not compiled: this machine lacks a C compiler or the headers of Python or libjpeg-turbo")
    folder = tmp_path_factory.mktemp("tiles")
    program = compiled(folder, "draw_tiles", FUZZ / "draw_tiles.c")

    def drawn(width: int, height: int, only: str = "") -> dict[str, bytes]:
        place = folder / f"{width}x{height}{only}"
        if not place.exists():
            place.mkdir()
            subprocess.run([program, place, str(width), str(height), "80", *filter(None, [only])], check=True)
        return {path.stem: path.read_bytes() for path in sorted(place.iterdir())}

    return drawn


def rare(width: int, height: int) -> dict[str, bytes]:
    """Kinds that only other encoders write."""
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)
    return {
        "lossless": imagecodecs.jpeg8_encode(pixels, lossless=True),
        "12bit": imagecodecs.jpeg8_encode(pixels.astype(np.uint16) * 16, level=80, bitspersample=12),
    }


def in_time(work: Callable[[], object], what: object) -> object:
    """What it returns; fails where it does not, for a call in C cannot be interrupted."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    assert not thread.is_alive(), f"{what}: no answer after {ANSWER_S} s"
    return found[0]


def part(data: bytes, side: int, reduce: int, place: tuple[int, int, int, int]) -> tuple[str | None, np.ndarray]:
    """Why it is damaged, or None; and the pixels."""
    left, top, right, bottom = place
    pixels = np.zeros((bottom - top, right - left, 3), np.uint8)
    places = np.array([[*place, 0, 0]])
    found = in_time(lambda: jpegparts.paint(pixels, [data], places, b"", True, side, side, reduce), (place, reduce))
    assert isinstance(found, dict)
    return found.get(0), pixels


def parts(draw: np.random.Generator, side: int, count: int) -> list[tuple[int, int, int, int]]:
    found = [(0, 0, 1, 1), (side - 1, side - 1, side, side), (0, 0, side, side)]
    for _ in range(count):
        (left, right), (top, bottom) = (sorted(draw.choice(side + 1, 2, replace=False).tolist()) for _ in range(2))
        found.append((left, top, right, bottom))
    return found


def whole(data: bytes, side: int, reduce: int) -> np.ndarray:
    """Another build of libjpeg-turbo, that knows no parts."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft(image.mode, (side // reduce, side // reduce))
        return np.asarray(image.convert("RGB"))


def test_the_decoder_is_there_where_it_can_be_compiled() -> None:
    """It is optional when the package is installed: whatever keeps it from compiling would skip every other test in silence."""
    if shutil.which("cc") is None:
        pytest.skip("this machine has no cc")
    command = ["cc", "-E", "-I", sysconfig.get_path("include"), "-x", "c", "-"]
    found = subprocess.run(command, input="#include <Python.h>\n#include <jpeglib.h>\n", capture_output=True, text=True)
    if lacks := re.search("(Python|jpeglib).h.*(No such file|not found)", found.stderr):
        pytest.skip(f"cc lacks headers: {lacks[0]}")
    assert jpegparts is not None


def test_parts_that_never_returned(draw: Draw) -> None:
    for name, data in draw(SIDE, SIDE).items():
        if name.startswith(("2x4", "4x2")):
            for reduce, place in NEVER_RETURNED.items():
                left, top, right, bottom = place
                reason, pixels = part(data, SIDE, reduce, place)
                assert reason is None, name
                np.testing.assert_array_equal(pixels, whole(data, SIDE, reduce)[top:bottom, left:right], name)


def test_every_kind_of_tile_is_cut_from_the_whole_or_refused(draw: Draw) -> None:
    chosen = np.random.default_rng(0)
    tiles = {**draw(SIDE, SIDE), **rare(SIDE, SIDE)}
    assert len(tiles) > 200
    for (name, data), reduce in product(tiles.items(), REDUCTIONS):
        side = SIDE // reduce
        read = not name.startswith(("cmyk", "lossless", "12bit"))
        expected = whole(data, SIDE, reduce) if read else None
        for left, top, right, bottom in parts(chosen, side, 3):
            reason, pixels = part(data, SIDE, reduce, (left, top, right, bottom))
            if expected is None:
                assert reason or (name == "lossless" and reduce == 1), (name, reduce)  # from libjpeg-turbo 3 on it is read
                continue
            assert reason is None, (name, reduce, reason)
            message = f"{name} at 1/{reduce}, part {left, top, right, bottom}"
            np.testing.assert_array_equal(pixels, expected[top:bottom, left:right], message)


def test_only_what_is_proven_is_decoded_in_parts(draw: Draw) -> None:
    """libjpeg is asked again where a baseline scan that this decoder took is not plainly whole; of every other kind never."""
    for name, data in draw(SIDE, SIDE).items():
        before = jpegparts.read_twice()
        part(data[:-2] + bytes(5) + data[-2:], SIDE, 1, (0, 0, 9, 9))
        taken = name.startswith(PROVEN) and not any(kind in name for kind in ("_arith", "_progr"))
        taken = taken and name.endswith(("_baseline", "_optimized", "_restart", "_rows"))
        assert jpegparts.read_twice() - before == taken, name


def test_verdicts_of_damaged_tiles_do_not_hang_on_the_part(draw: Draw) -> None:
    chosen, verdicts = np.random.default_rng(1), []
    for name, data in draw(SIDE, SIDE).items():
        start = data.index(b"\xff\xda")
        at = int(chosen.integers(start, len(data) - 2))
        for harmed in (data[:at], data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :], data[:at] + b"\0\0\0" + data[at + 3 :]):
            found = [part(harmed, SIDE, 1, place)[0] is None for place in ((0, 0, SIDE, SIDE), (0, 0, 1, 1), (60, 50, 64, 61))]
            assert len(set(found)) == 1, name
            verdicts += found
    assert True in verdicts and False in verdicts


def bomb(draw: Draw, side: int, scans: int) -> bytes:
    """A tile of so many scans of ten bytes and no data, each of which is arithmetic code for every block."""
    (data,) = draw(side, side, "1x1_separate_arithmetic").values()
    start = data.index(b"\xff\xda")
    scan = data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]
    return data[:start] + scan * scans + data[start:]


def test_a_tile_of_thousands_of_scans_is_damage_at_once(draw: Draw) -> None:
    data = bomb(draw, 512, 20_000)
    started = time.thread_time()
    pixels, places = np.zeros((9, 9, 3), np.uint8), np.array([[0, 0, 9, 9, 0, 0]])
    found = in_time(lambda: (jpegparts.paint(pixels, [data], places, b"", True, 512, 512, 1), time.thread_time()), "bomb")
    assert isinstance(found, tuple) and "more than 100 scans" in found[0][0] and found[1] < 5
    level = Level(512, 512, 512, 512, 1.0, "jpeg", "ycbcr", 1, b"", np.zeros(0, np.int64), np.zeros(0, np.int64))
    with pytest.raises(DecodeError, match="more than 100 scans"):  # where nothing was compiled
        decode_tile(data, level)
    with pytest.raises(PictureError, match="more than 100 scans"):  # a ready tile, a labelled image
        pixels_of(data)
    assert time.thread_time() - started < 5


def test_what_is_slow_within_the_bounds_ends_when_it_is_told_to(draw: Draw) -> None:
    data, pixels = bomb(draw, 1024, 80), np.zeros((9, 9, 3), np.uint8)
    places = np.array([[0, 0, 9, 9, 0, 0]] * 3)
    started = time.thread_time()
    with pytest.raises(TimeoutError, match="3 JPEG tiles"):
        jpegparts.paint(pixels, [data] * 3, places, b"", True, 1024, 1024, 1, 0.05)
    assert time.thread_time() - started < 1
    assert jpegparts.paint(pixels, [data[:200]] * 3, places, b"", True, 1024, 1024, 1, 60.0).keys() == {0, 1, 2}


def test_a_lossless_tile_is_not_reduced(draw: Draw) -> None:
    """The whole-tile decoder would write its full size into the memory of the reduced one."""
    level = Level(SIDE, SIDE, SIDE, SIDE, 1.0, "jpeg", "ycbcr", 1, b"", np.zeros(0, np.int64), np.zeros(0, np.int64))
    for reduce in (2, 4, 8):
        with pytest.raises(DecodeError, match="lossless"):
            decode_tile(rare(SIDE, SIDE)["lossless"], level, reduce)


def every_part(folder: Path, draw: Draw, width: int, height: int, kinds: str, step: int) -> tuple[int, int]:
    """Parts compared, and wrong ones, of the tiles whose names match."""
    program = compiled(folder, "every_part", FUZZ / "every_part.c", *DECODER)
    paths = []
    for name, data in draw(width, height).items():
        if re.fullmatch(kinds, name):
            paths.append(folder / f"{name}.jpg")
            paths[-1].write_bytes(data)
    done = subprocess.run([program, str(step), *paths], capture_output=True, text=True, timeout=280)
    counts = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) parts, (\d+) wrong", done.stdout)]
    assert done.returncode in (0, 1) and len(counts) == 4 * len(paths), done.stderr
    assert done.returncode == 0, [line for line in done.stdout.splitlines() if ", 0 wrong" not in line]
    return sum(count for count, _ in counts), sum(bad for _, bad in counts)


def test_a_share_of_all_parts_is_the_whole_tile_cut(draw: Draw, tmp_path: Path) -> None:
    compared, wrong = every_part(tmp_path, draw, 48, 48, ".*", 4999)
    assert compared > 50_000 and wrong == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling, width, height", [("1x1", 32, 40), ("2x1", 64, 40), ("1x2", 32, 72), ("2x2", 64, 72), ("4x1", 128, 32)]
)
def test_all_parts_are_the_whole_tile_cut(draw: Draw, tmp_path: Path, sampling: str, width: int, height: int) -> None:
    """Wide and high enough for what is left out on each side of a part; of the larger ones each 29th part."""
    compared, wrong = every_part(tmp_path, draw, width, height, f"{sampling}_baseline", 1 if width * height < 2000 else 29)
    assert compared > 50_000 and wrong == 0


def seeds(draw: Draw, folder: Path) -> None:
    """Every kind of tile, whole and damaged, behind a head that says which part at which scale."""
    folder.mkdir()
    chosen = np.random.default_rng(2)
    tiles = {**draw(32, 32), **rare(32, 32), "bomb": bomb(draw, 32, 200)}
    tiles |= {
        f"large_{name}": data for name, data in draw(80, 80).items() if re.fullmatch(".x._(baseline|rows|progressive)", name)
    }
    for (name, data), reduce in product(tiles.items(), range(4)):
        head = bytes([1 | reduce << 1, *chosen.integers(0, 256, 4).tolist()])
        at = int(chosen.integers(len(data)))
        (folder / f"{name}_{reduce}").write_bytes(head + data)
        (folder / f"{name}_{reduce}_damaged").write_bytes(head + data[:at] + chosen.bytes(2) + data[at + 2 :])


def test_saved_inputs_show_no_part_that_differs_and_no_fault_of_memory(draw: Draw, tmp_path: Path) -> None:
    """What fuzzing begins with, by the sanitizers that come with the compiler."""
    sources = (FUZZ / "replay.c", FUZZ / "part_fuzz.c", *DECODER)
    program = compiled(tmp_path, "replay", *sources, compiler="gcc", flags=(*SANITIZERS, "-fsanitize=address,undefined"))
    seeds(draw, tmp_path / "seeds")
    paths = sorted((tmp_path / "seeds").iterdir())
    done = subprocess.run([program, *paths], capture_output=True, text=True, errors="replace", timeout=280)
    assert len(paths) > 1000 and done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(600 + FUZZ_S)
@pytest.mark.slow
def test_fuzzing_finds_no_part_that_differs_and_none_that_stands(draw: Draw, tmp_path: Path) -> None:
    flags = (*SANITIZERS, "-fsanitize=fuzzer,address,undefined")
    program = compiled(tmp_path, "part_fuzz", FUZZ / "part_fuzz.c", *DECODER, compiler="clang", flags=flags)
    seeds(draw, tmp_path / "seeds")
    options = [f"-max_total_time={FUZZ_S}", "-timeout=5", "-rss_limit_mb=512", "-max_len=8192", "-print_final_stats=1"]
    command = ["sh", "-c", '"$@"; exit $?', "sh", program, *options, tmp_path / "seeds"]  # else its peak begins with ours
    kept = {**os.environ, "ASAN_OPTIONS": "quarantine_size_mb=64"}  # of what was freed; by default as much as is allowed
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, errors="replace")
    found = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    print(found)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(found["number_of_executed_units"]) > 1000 and int(found["slowest_unit_time_sec"]) <= 5
