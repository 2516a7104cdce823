"""The five root folders stay one namespace in every way of installing."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "data", "eval", "launch", "pretrain")


def source_packages() -> set[str]:
    found = {"histoscale"}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py",) and "__pycache__" not in file.parts:
                found.add("histoscale." + ".".join(file.parent.relative_to(ROOT).parts))
    return found


def test_every_folder_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    yaml_folders = {"histoscale." + ".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "configs").rglob("*.yaml")}
    assert listed == source_packages() | yaml_folders


def test_links_lead_to_the_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / ".ns" / "histoscale" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_bare_name_is_refused(folder: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"  # PYTHONSAFEPATH may keep the folder out
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and f"import histoscale.{folder}, not {folder}" in done.stderr


def test_nothing_installed(tmp_path: Path) -> None:
    """PYTHONPATH=.ns is the way on a machine without a package index."""
    code = "import histoscale.data.keys, histoscale.launch.config; print(histoscale.data.keys.__file__)"
    bare = {"PYTHONPATH": str(ROOT / ".ns"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wheel_from_a_clone_without_links(tmp_path: Path) -> None:
    """A zip of the repository, or a system without symbolic links, must still build a whole wheel."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "-c", "core.symlinks=false", "clone", "-q", str(ROOT), str(clone)], check=True)
    if find_spec("pip") is None:
        pytest.skip("this environment has no pip to build a wheel with")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(clone)]
    built = subprocess.run(pip, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("no package index can be reached, which the build needs for setuptools")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("histoscale-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".py", ".yaml", ".html", ".csv"))}
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=clone, capture_output=True, text=True, check=True).stdout.split()
    assert {f"histoscale/{name}" for name in tracked if name.endswith((".py", ".yaml", ".html", ".csv"))} <= packed


def test_rooms_depend_in_one_direction() -> None:
    order = ["data", "pretrain", "eval", "launch"]
    for i, room in enumerate(order):
        for file in (ROOT / room).rglob("*.py"):
            for line in file.read_text().splitlines():
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].startswith("histoscale."):
                    assert words[1].split(".")[1] in order[: i + 1], f"{file.relative_to(ROOT)}: {line.strip()}"
