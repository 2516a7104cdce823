"""What is installed: every file by its hash, licences that are permitted, known holes, and the tests that SECURITY.md names."""

import base64
import hashlib
import json
import re
import shutil
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from histoscale.launch import audit, licences, up

ROOT = Path(__file__).resolve().parents[1]
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


@pytest.mark.parametrize("file", [up.CONSTRAINTS, up.OLDEST_PINS], ids=lambda path: path.name)
def test_every_pin_has_a_version_and_hashes_and_no_place(file: Path) -> None:
    found = list(up.pins(file))
    assert len(found) > 10 and "".join(block for _, block in found) == file.read_text()
    for name, block in found:
        first, *rest = block.rstrip().split(" \\\n")
        assert re.match(rf"{re.escape(name)}==[\w.+!]+( ; .+)?$", first)
        assert rest and all(HASH.fullmatch(line.strip()) for line in rest)
    assert "://" not in file.read_text()


def test_the_oldest_pins_are_the_lowest_that_are_declared() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    oldest = [re.match(r"(\S+?)==(\S+)", block) for _, block in up.pins(up.OLDEST_PINS)]
    versions = {found[1]: found[2] for found in oldest if found}
    for name in up.OLDEST:
        bound = re.search(rf'"{name}>=([0-9.]+)', declared)
        assert bound and versions[name].startswith(bound[1])


def wheel(folder: Path, body: str) -> str:
    """A wheel of `tiny` 1.0 in a folder; its SHA-256."""
    info, files = "tiny-1.0.dist-info", {"tiny.py": body}
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in files.items()}
    files[f"{info}/RECORD"] = "".join(f"{name},sha256={digests[name].rstrip('=')},{len(files[name])}\n" for name in files)
    files[f"{info}/RECORD"] += f"{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for name, text in files.items():
            packed.writestr(zipfile.ZipInfo(name), text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_a_file_of_another_hash_is_not_installed(tmp_path: Path, tool: str, capfd: pytest.CaptureFixture[str]) -> None:
    if not (shutil.which("uv") if tool == "uv" else find_spec("pip")):
        pytest.skip(f"this environment has no {tool}")
    start = ["uv", "pip", "install", "--python"] if tool == "uv" else []
    start += [sys.executable] if tool == "uv" else [sys.executable, "-m", "pip", "install"]
    index, target, constraints = tmp_path / "index", tmp_path / "target", tmp_path / "constraints.txt"
    command = [*start, "--no-index", "--no-cache-dir", "--find-links", str(index), "--target", str(target)]
    constraints.write_text(f"tiny==1.0 \\\n    --hash=sha256:{wheel(index, 'ours = True')}\n")
    wheel(index, "ours = False")
    assert not up.install(command, constraints)
    assert not list(target.glob("tiny*")) and "hash" in capfd.readouterr().err.lower()
    wheel(index, "ours = True")
    assert up.install(command, constraints) and (target / "tiny.py").read_text() == "ours = True"
    shutil.rmtree(target)
    constraints.write_text("tiny==1.0\n")
    assert not up.install(command, constraints)  # one without a hash is none that was checked


def test_licences_are_known_permitted_and_listed() -> None:
    found = dict(licences.rows())
    assert not {name: said for name, said in found.items() if said is None or not licences.permitted(said)}
    assert {name for name, _ in up.pins(up.CONSTRAINTS)} == set(found)
    written = licences.LIST.read_text()
    for name, block in up.pins(up.CONSTRAINTS):
        assert f"\n| {name} | " in written
        if f"{name}=={_installed(name)}" == block.split()[0]:  # another version may say it in other words
            assert f"\n| {name} | {found[name]} |\n" in written, "run `python3 launch/up.py licences`"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@pytest.mark.parametrize(
    "expression, good",
    [
        ("MIT", True),
        ("GPL-3.0-or-later", False),
        ("AGPL-3.0-only OR MIT", True),
        ("MIT AND (BSD-3-Clause OR GPL-2.0-only) AND Zlib", True),
        ("MIT AND (AGPL-3.0-only OR GPL-2.0-only) AND Zlib", False),
        ("MIT OR Apache-2.0 AND GPL-2.0-only", True),
        ("GPL-2.0-only OR Apache-2.0 AND GPL-2.0-only", False),
        ("Apache-2.0 WITH LLVM-exception AND BSD-2-Clause", True),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ("CC-BY-NC-4.0", False),
        ("Freeware", False),
    ],
)
def test_expressions_are_judged(expression: str, good: bool) -> None:
    assert licences.permitted(expression) == good


def distribution(folder: Path, head: str) -> None:
    (folder / "odd_one-1.dist-info").mkdir()
    (folder / "odd_one-1.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: odd-one\nVersion: 1\n{head}\n")


@pytest.mark.parametrize(
    "head, said",
    [
        ("License-Expression: AGPL-3.0-only", "AGPL-3.0-only, which is not permitted"),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "an unknown licence"),
        ("License: CC-BY-NC-4.0", "CC-BY-NC-4.0, which is not permitted"),
        ("License: see LICENSE", "an unknown licence"),
        ("", "an unknown licence"),
    ],
)
def test_a_package_that_is_not_permitted_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], head: str, said: str
) -> None:
    distribution(tmp_path, head)
    (tmp_path / "constraints.txt").write_text("odd-one==1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(licences, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(licences, "LIST", tmp_path / "LICENSES.md")
    assert licences.main() == 1 and f"odd-one has {said}" in capsys.readouterr().err
    assert not (tmp_path / "LICENSES.md").exists()
    (tmp_path / "LICENSES.md").write_text("| odd-one | MIT |\n")  # what an earlier version said
    assert licences.main() == 1 and f"odd-one has {said}" in capsys.readouterr().err
    assert (tmp_path / "LICENSES.md").read_text() == "| odd-one | MIT |\n"


def advisory(folder: Path, name: str = "Odd_One", **part: object) -> None:
    folder.mkdir(exist_ok=True)
    affected = [{"package": {"ecosystem": "PyPI", "name": name}, **part}]
    words = {"id": "GHSA-1", "aliases": ["CVE-1"], "summary": "a hole", "modified": "2026-01-01T00:00:00Z", "affected": affected}
    (folder / f"{len(list(folder.iterdir()))}.json").write_text(json.dumps(words))


def span(*events: tuple[str, str], kind: str = "ECOSYSTEM") -> dict[str, object]:
    return {"ranges": [{"type": kind, "events": [{name: value} for name, value in events]}]}


@pytest.mark.parametrize(
    "part, versions",
    [
        (span(("introduced", "0"), ("fixed", "1.10")), "0a1 0.9 1 1.1 1.2 1.3 1.4 1.4+cu1 1.5 1.9 1.9.post1 1.9+local 1.10rc1"),
        (span(("introduced", "1.2"), ("last_affected", "1.4")), "1.2 1.3 1.4 1.4+cu1"),
        (span(("introduced", "0"), ("fixed", "1"), ("introduced", "1.3"), ("fixed", "1.5")), "0a1 0.9 1.3 1.4 1.4+cu1"),
        (span(("introduced", "1.9")), "1.9 1.9.post1 1.9+local 1.10rc1 1.10 2"),
        (span(("introduced", "0"), kind="GIT"), ""),
        ({"versions": ["1.4", "2"]}, "1.4 1.4+cu1 2"),
        (span(("introduced", "what")), "all"),  # cannot be compared
    ],
)
def test_versions_are_held_against_ranges(tmp_path: Path, part: dict[str, object], versions: str) -> None:
    every = "0a1 0.9 1 1.1 1.2 1.3 1.4 1.4+cu1 1.5 1.9 1.9.post1 1.9+local 1.10rc1 1.10 2".split()
    advisory(tmp_path, **part)
    found = list(audit.findings(audit.read_advisories(tmp_path), {("odd-one", one) for one in every}))
    assert {line.split(":")[0].split()[1] for line in found} == set(every if versions == "all" else versions.split())


def test_a_known_hole_in_a_pinned_version_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pinned = next(block for name, block in up.pins(up.CONSTRAINTS) if name == "jinja2").split()[0].split("==")[1]
    advisory(tmp_path, "numpy", **span(("introduced", "0"), ("fixed", "0.1")))
    assert audit.main([f"database={tmp_path}"]) == 0
    assert "0 findings" in capsys.readouterr().out
    advisory(tmp_path, "Jinja2", **span(("introduced", "0"), ("last_affected", pinned)))
    assert audit.main([f"database={tmp_path}"]) == 1
    assert f"Jinja2 {pinned}: GHSA-1, CVE-1: a hole" in capsys.readouterr().out


def test_without_a_database_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["database=a", "database=b"], [f"database={tmp_path}"], [f"database={tmp_path}/absent"]):
        assert audit.main(words) == 2
    (tmp_path / "a.json").write_text("[]")
    assert audit.main([f"database={tmp_path}"]) == 2
    assert "cannot say whether anything is known" in capsys.readouterr().err


def test_security_names_tests_that_exist() -> None:
    named = re.findall(r"`tests/([\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    for file, function in named:
        text = (ROOT / "tests" / file).read_text()
        assert not function or f"def {function}(" in text, f"tests/{file} has no {function}"
