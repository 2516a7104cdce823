#!/usr/bin/env python3
"""Set up the environment on a bare machine, then run a command in it. Standard library only.

    python3 launch/up.py demo out=runs/demo     # the whole story on a synthetic cohort; any command of histoscale runs so
    python3 launch/up.py test                   # the tests of a user's machine: under 15 minutes
    python3 launch/up.py test all               # every test, lint and types: what CI runs
    python3 launch/up.py test -n 0 tests/test_index.py    # what follows goes to pytest; -n: how many at a time
    python3 launch/up.py audit database=advisories        # known holes in what is installed: a folder of OSV's JSON files
    python3 launch/up.py licences                         # of every package, into LICENSES.md; fails on one that is not permitted
    python3 launch/up.py pin --upgrade                    # newer versions and their hashes into constraints.txt; needs uv

NO_UV=1 forces pip. The environment is .venv beside this folder; it is made again when pyproject.toml,
constraints.txt or the C source change. Every package is of the version in constraints.txt, and its file has one of the
SHA-256 that stand there; what has another is not installed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VENV_OLDEST = ROOT / ".venv-oldest"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("test", "lint", "hf", "s3", "gcs", "obstore")  # that constraints.txt is made for
OWN = ("test", "audit", "licences", "pin")  # commands of this script; all others are histoscale's
OLDEST = ("torch", "torchvision", "timm")  # `test all` runs the trainer on their lowest versions too
OLDEST_PINS = ROOT / "tests/oldest.txt"
OLDEST_TESTS = [f"tests/test_{name}.py" for name in ("blocks", "losses", "heads", "parallel", "checkpoint", "saving", "trainer")]
# What comes with torch has the version that it asks for.
WITH_OLDEST = re.compile(rf"({'|'.join(OLDEST)}|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)")
COMPILED = [f"data/readers/{name}" for name in ("jpegparts.c", "jpegtile.c", "jpegtile.h", "jpegscan.c", "jpegscan.h")]
WORKER_BYTES = 3 << 30  # what a worker of the tests may come to hold, with the processes that it starts
DOWNLOAD = "about 2.7 GB to download, 6 GB on disk"


def say(text: str) -> None:
    print(f"[up] {text}", file=sys.stderr, flush=True)


def python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp(constraints: Path) -> str:
    """What an environment was made from: files and the Python that runs this script."""
    content = b"".join(path.read_bytes() for path in (ROOT / "pyproject.toml", constraints, *(ROOT / name for name in COMPILED)))
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def make_environment(folder: Path, constraints: Path) -> None:
    """Create it and install, with uv where it is, else pip; a finished environment is left as it is."""
    marker = folder / "histoscale.stamp"
    if python(folder).exists() and marker.exists() and marker.read_text() == stamp(constraints):
        return
    if sys.version_info < (3, 11):  # noqa: UP036  (this script meets any Python)
        sys.exit(f"[up] Python 3.11 or newer is needed; this is {sys.version.split()[0]} at {sys.executable}")
    uv = None if os.environ.get("NO_UV") else shutil.which("uv")
    start = time.monotonic()
    say(f"making {folder.name} with {'uv' if uv else 'pip'} ({DOWNLOAD})")
    try:
        if not python(folder).exists():
            venv.create(folder, with_pip=True)
    except (subprocess.CalledProcessError, ImportError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"[up] {sys.executable} cannot make environments: install venv (Debian: apt install python{version}-venv)")
    say(f"installing the packages of {constraints.name} (minutes on a slow line; silent while it downloads)")
    tools = [[uv, "pip", "install", "--python", str(python(folder))]] if uv else []
    tools += [[str(python(folder)), "-m", "pip", "install", "--disable-pip-version-check"]]
    this = ["-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    if not any(install(tool, constraints) and subprocess.run([*tool, *this]).returncode == 0 for tool in tools):
        why = f"a file whose hash {constraints.name} does not name is refused; otherwise the index may be out of reach"
        sys.exit(f"[up] the installation failed (see above: {why}); run the same command again")
    marker.write_text(stamp(constraints))
    say(f"environment ready after {time.monotonic() - start:.0f} s")


def install(tool: list[str], constraints: Path) -> bool:
    """The packages of a constraints file, each file checked against the hashes that stand there. Nothing is resolved, and nothing
    unchecked is fetched to build with: the builder of the few that have no wheel comes first."""
    checked = [*tool, "-q", "--require-hashes", "--no-deps", "--no-build-isolation", "-r"]
    with tempfile.TemporaryDirectory() as place:
        builder = Path(place, "builder.txt")
        builder.write_text("".join(block for name, block in pins(constraints) if name == "setuptools"))
        return all(subprocess.run([*checked, str(file)]).returncode == 0 for file in (builder, constraints))


def pins(constraints: Path) -> Iterator[tuple[str, str]]:
    """Name and lines of each pin: version, marker and hashes."""
    for block in re.findall(r"^\w.*?(?=^\S|\Z)", constraints.read_text(), re.MULTILINE | re.DOTALL):
        yield block.partition("==")[0], block


def oldest_constraints() -> Path:
    """constraints.txt with torch, torchvision and timm at the lowest versions that pyproject.toml allows."""
    path = ROOT / "build/oldest-constraints.txt"
    path.parent.mkdir(exist_ok=True)
    newer = [block for name, block in pins(CONSTRAINTS) if not WITH_OLDEST.fullmatch(name)]
    path.write_text("".join([*newer, OLDEST_PINS.read_text()]))
    return path


def pin(arguments: list[str]) -> int:
    """Write constraints.txt and tests/oldest.txt anew, with the hashes of all files of each version; returns an exit code.

    Versions stay as they are where they can, unless the arguments, which go to uv, say `--upgrade`.
    """
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("[up] pin resolves with uv, which is not installed: pip install uv")
    resolve = [uv, "pip", "compile", "-q", "--universal", "--python-version=3.11", "--generate-hashes", "--no-header"]
    resolve += ["--no-annotate", *arguments]
    extras = [f"--extra={name}" for name in EXTRAS]
    if subprocess.run([*resolve, *extras, "pyproject.toml", "-o", str(CONSTRAINTS)], cwd=ROOT).returncode != 0:
        return 1
    declared = (ROOT / "pyproject.toml").read_text()
    lowest = [f"{name}=={bound}" for name in OLDEST for bound in re.findall(rf'"{name}>=([0-9.]+)', declared)]
    found = subprocess.run([*resolve, "-"], cwd=ROOT, input="\n".join(lowest), stdout=subprocess.PIPE, text=True)
    if found.returncode == 0:
        OLDEST_PINS.write_text(found.stdout)
        OLDEST_PINS.write_text("".join(block for name, block in pins(OLDEST_PINS) if WITH_OLDEST.fullmatch(name)))
    return found.returncode


def call(*command: str, folder: Path = VENV, cwd: Path | None = ROOT, **variables: str) -> int:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **variables}
    return subprocess.run([str(python(folder)), *command], cwd=cwd, env=environment).returncode


def become(*command: str) -> int:
    """Run a command in place of this process, so that signals and Ctrl-C reach it alone; its exit code where that cannot be."""
    if os.name == "nt":
        return call(*command, cwd=None)
    os.execve(python(VENV), [str(python(VENV)), *command], {**os.environ, "PYTHONSAFEPATH": "1"})


def free_bytes() -> int:
    """Memory that is available here, as far as the system says it."""
    try:
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else WORKER_BYTES


def spread(arguments: list[str]) -> list[str]:
    """What tells pytest to use the cores, within memory; nothing where the user has said -n, or a debugger needs the terminal."""
    said = ("-n", "--numprocesses", "--dist", "--pdb", "--trace", "-s", "--capture")
    if any(argument.startswith(said) and not argument.startswith("-no") for argument in arguments):
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, free_bytes() // WORKER_BYTES)
    return ["-n", str(workers), "--dist", "loadscope", "--no-loadscope-reorder"] if workers > 1 else []


def test(arguments: list[str]) -> int:
    """Lint, types, tests; `all` adds the slow ones, and the trainer's on the oldest torch. Further arguments go to pytest.

    Returns the first failing exit code.
    """
    everything = arguments[:1] == ["all"]
    rest = arguments[1:] if everything else arguments
    say("lint")
    code = call("-m", "ruff", "check", str(ROOT))
    say("types")
    code = code or call("-m", "mypy")
    say("tests" + (" (all)" if everything else " (quick: `test all` also runs the slow ones)"))
    chosen = [] if everything else ["-m", "not slow"]
    code = code or call("-m", "pytest", "-q", *chosen, *spread(rest), *rest, OMP_NUM_THREADS="1")
    if code or not everything or rest:
        return code
    say(f"tests of the trainer on the oldest {', '.join(OLDEST)}")
    make_environment(VENV_OLDEST, oldest_constraints())
    return call("-m", "pytest", "-q", "-m", "not slow", *spread(rest), *OLDEST_TESTS, folder=VENV_OLDEST, OMP_NUM_THREADS="1")


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if arguments[0] == "pin":
        return pin(arguments[1:])
    make_environment(VENV, CONSTRAINTS)
    if arguments[0] == "test":
        return test(arguments[1:])
    if arguments[0] in OWN:
        return become("-m", f"histoscale.launch.{arguments[0]}", *arguments[1:])
    return become("-m", "histoscale.launch.cli", *arguments)


if __name__ == "__main__":
    sys.exit(main())
