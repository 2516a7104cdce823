#!/usr/bin/env python3
"""Set up the environment on a bare machine, then run a command in it. Standard library only.

    python3 launch/up.py demo [out=DIR]     the whole story on a synthetic cohort
    python3 launch/up.py test               the tests of a user's machine: under 15 minutes
    python3 launch/up.py test all           every test, lint and types: what CI runs
    python3 launch/up.py <command> key=value …   any command of histoscale

NO_UV=1 forces pip. The environment is .venv beside this folder; it is made again when pyproject.toml,
constraints.txt or the C source change.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VENV_OLDEST = ROOT / ".venv-oldest"
EXTRAS = "test,lint,hf,s3,gcs,obstore"
OLDEST = ("torch", "torchvision", "timm")  # `test all` runs the trainer on their lowest versions too
OLDEST_TESTS = [f"tests/test_{name}.py" for name in ("blocks", "losses", "heads", "parallel", "checkpoint", "saving", "trainer")]
COMPILED = [f"data/readers/{name}" for name in ("jpegparts.c", "jpegscan.c", "jpegscan.h")]
DOWNLOAD = "about 2.7 GB to download, 6 GB on disk"


def say(text: str) -> None:
    print(f"[up] {text}", file=sys.stderr, flush=True)


def python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp(extras: str, constraints: Path) -> str:
    """What an environment was made from: files, extras and the Python that runs this script."""
    content = b"".join(path.read_bytes() for path in (ROOT / "pyproject.toml", constraints, *(ROOT / name for name in COMPILED)))
    return hashlib.sha256(content + extras.encode() + sys.version.encode()).hexdigest()


def make_environment(folder: Path, extras: str, constraints: Path) -> None:
    """Create it and install, with uv where it is, else pip; a finished environment is left as it is."""
    marker = folder / "histoscale.stamp"
    if python(folder).exists() and marker.exists() and marker.read_text() == stamp(extras, constraints):
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
    wanted = ["-e", f"{ROOT}[{extras}]", "-c", str(constraints)]
    say(f"installing the packages of {constraints.name} (minutes on a slow line; silent while it downloads)")
    quietly = ["pip", "install", "-q", "--python", str(python(folder)), *wanted]
    done = uv is not None and subprocess.run([uv, *quietly]).returncode == 0
    if not done:
        if uv is not None:
            say("uv could not install; trying pip")
        pip = [str(python(folder)), "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
        if subprocess.run(pip).returncode != 0:
            sys.exit("[up] the installation failed (see above); run the same command again once the package index can be reached")
    marker.write_text(stamp(extras, constraints))
    say(f"environment ready after {time.monotonic() - start:.0f} s")


def oldest_constraints() -> Path:
    """constraints.txt with torch, torchvision and timm at the lowest versions that pyproject.toml allows."""
    declared = (ROOT / "pyproject.toml").read_text()
    found = {name: re.search(rf'"{name}>=([0-9.]+)', declared) for name in OLDEST}
    pins = [f"{name}=={bound.group(1)}" for name, bound in found.items() if bound]
    # What comes with torch has the version that it asks for.
    theirs = re.compile(rf"({'|'.join(OLDEST)}|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
    rest = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not theirs.match(line)]
    path = ROOT / "build/oldest-constraints.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([*rest, *pins]) + "\n")
    return path


def call(*command: str, folder: Path = VENV, cwd: Path | None = ROOT) -> int:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([str(python(folder)), *command], cwd=cwd, env=environment).returncode


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
    code = code or call("-m", "pytest", "-q", *chosen, *rest)
    if code or not everything or rest:
        return code
    say(f"tests of the trainer on the oldest {', '.join(OLDEST)}")
    make_environment(VENV_OLDEST, "test", oldest_constraints())
    return call("-m", "pytest", "-q", "-m", "not slow", *OLDEST_TESTS, folder=VENV_OLDEST)


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    make_environment(VENV, EXTRAS, ROOT / "constraints.txt")
    if arguments[0] == "test":
        return test(arguments[1:])
    return call("-m", "histoscale.launch.cli", *arguments, cwd=None)


if __name__ == "__main__":
    sys.exit(main())
