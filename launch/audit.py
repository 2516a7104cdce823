"""Known holes in what is installed or pinned, by a saved database of advisories: nothing is asked of a network.

    python3 launch/up.py audit database=advisories

database: a folder of OSV's JSON files (its export of the ecosystem PyPI, unpacked), an advisory a file. Exit code 0: none of
them concerns a package here; 1: one does; 2: there is no such database, so that nothing can be said.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from histoscale.launch.up import CONSTRAINTS, pins

CLEAN, FOUND, UNKNOWN = 0, 1, 2


def packages() -> set[tuple[str, str]]:
    """Name and version of what this environment has and of what constraints.txt would install."""
    pinned = {(name, version) for name, block in pins(CONSTRAINTS) for version in re.findall(r"^\S+?==(\S+)", block)}
    installed = {(str(one.metadata["Name"]), one.version) for one in distributions()}
    return {(canonicalize_name(name), version) for name, version in pinned | installed}


def read_advisories(folder: Path) -> list[dict[str, Any]]:
    """Those of PyPI that were not withdrawn. Raises ValueError where the folder holds none or a file is no advisory."""
    found = []
    for path in sorted(folder.glob("**/*.json")):
        try:
            one = json.loads(path.read_bytes())
            concerned = [each["package"]["name"] for each in one["affected"] if each["package"]["ecosystem"] == "PyPI"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no advisory of OSV ({type(error).__name__}: {error})") from error
        if concerned and not one.get("withdrawn"):
            found.append(one)
    if not found:
        raise ValueError(f"{folder} holds no advisory: expected OSV's JSON files of the ecosystem PyPI")
    return found


def findings(advisories: Iterable[dict[str, Any]], here: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A line for each advisory that a package is affected by."""
    versions: dict[str, list[str]] = {}
    for name, version in sorted(here):
        versions.setdefault(name, []).append(version)
    for advisory in advisories:
        for part in advisory["affected"]:
            for version in versions.get(canonicalize_name(part["package"]["name"]), []):
                if part["package"]["ecosystem"] == "PyPI" and affected(part, version):
                    names = ", ".join([advisory["id"], *advisory.get("aliases", [])])
                    yield f"{part['package']['name']} {version}: {names}: {advisory.get('summary', 'no summary')}"


def affected(part: dict[str, Any], version: str) -> bool:
    """Whether an entry of `affected` concerns a version. One that cannot be compared counts: somebody must look."""
    try:
        public = Version(version).public  # without what a builder added: 2.1+cu130 has the holes of 2.1
        if {version, public} & set(part.get("versions", [])):
            return True
        return any(_inside(span["events"], Version(public)) for span in part.get("ranges", []) if span["type"] != "GIT")
    except InvalidVersion:
        return True


def _inside(events: list[dict[str, str]], version: Version) -> bool:
    """Events in the order of their versions: introduced opens; fixed, and what follows last_affected, closes."""
    inside = False
    each = [(kind, value) for event in events for kind, value in event.items() if kind != "limit"]
    for at, kind in sorted((Version("0.dev0" if value == "0" else value), kind) for kind, value in each):
        if version > at or (version == at and kind != "last_affected"):
            inside = kind == "introduced"
    return inside


def main(arguments: list[str]) -> int:
    """The exit code."""
    named = [word.removeprefix("database=") for word in arguments if word.startswith("database=")]
    if len(named) != 1 or len(arguments) != 1:
        print("[audit] expected database=FOLDER, a folder of OSV's JSON files of the ecosystem PyPI", file=sys.stderr)
        return UNKNOWN
    try:
        advisories = read_advisories(Path(named[0]).expanduser())
    except ValueError as error:
        print(f"[audit] cannot say whether anything is known: {error}", file=sys.stderr)
        return UNKNOWN
    here = packages()
    found = list(findings(advisories, here))
    newest = max(one.get("modified", "") for one in advisories)
    known = f"{len(advisories)} advisories, the newest of {newest}"
    print("\n".join([*found, f"[audit] {len(found)} findings: {len(here)} packages against {known}"]))
    return FOUND if found else CLEAN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
