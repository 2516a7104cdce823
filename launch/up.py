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
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
EXTRAS = "test,lint,hf,s3,gcs,obstore"
COMPILED = "data/readers/jpegparts.c"
DOWNLOAD = "about 2.7 GB to download, 6 GB on disk"


def say(text: str) -> None:
    print(f"[up] {text}", file=sys.stderr, flush=True)


def stamp() -> str:
    """What the environment was made from: files, extras and the Python that runs this script."""
    content = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", COMPILED))
    return hashlib.sha256(content + EXTRAS.encode() + sys.version.encode()).hexdigest()


def make_environment() -> None:
    """Create .venv and install, with uv where it is, else pip; a finished environment is left as it is."""
    marker = VENV / "histoscale.stamp"
    if PYTHON.exists() and marker.exists() and marker.read_text() == stamp():
        return
    if sys.version_info < (3, 11):  # noqa: UP036  (this script meets any Python)
        sys.exit(f"[up] Python 3.11 or newer is needed; this is {sys.version.split()[0]} at {sys.executable}")
    uv = None if os.environ.get("NO_UV") else shutil.which("uv")
    start = time.monotonic()
    say(f"making .venv with {'uv' if uv else 'pip'} ({DOWNLOAD})")
    try:
        if not PYTHON.exists():
            venv.create(VENV, with_pip=True)
    except (subprocess.CalledProcessError, ImportError, OSError):
        shutil.rmtree(VENV, ignore_errors=True)
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"[up] {sys.executable} cannot make environments: install venv (Debian: apt install python{version}-venv)")
    wanted = ["-e", f"{ROOT}[{EXTRAS}]", "-c", str(ROOT / "constraints.txt")]
    say("installing the packages of constraints.txt (minutes on a slow line; silent while it downloads)")
    done = uv is not None and subprocess.run([uv, "pip", "install", "-q", "--python", str(PYTHON), *wanted]).returncode == 0
    if not done:
        if uv is not None:
            say("uv could not install; trying pip")
        pip = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted]
        if subprocess.run(pip).returncode != 0:
            sys.exit("[up] the installation failed (see above); run the same command again once the package index can be reached")
    marker.write_text(stamp())
    say(f"environment ready after {time.monotonic() - start:.0f} s")


def call(*command: str) -> int:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([str(PYTHON), *command], cwd=ROOT, env=environment).returncode


def test(arguments: list[str]) -> int:
    """Lint, types, tests; `all` adds the slow ones. Further arguments go to pytest. Returns the first failing exit code."""
    everything = arguments[:1] == ["all"]
    rest = arguments[1:] if everything else arguments
    say("lint")
    code = call("-m", "ruff", "check", str(ROOT))
    say("types")
    code = code or call("-m", "mypy")
    say("tests" + (" (all)" if everything else " (quick: `test all` also runs the slow ones)"))
    chosen = [] if everything else ["-m", "not slow"]
    return code or call("-m", "pytest", "-q", *chosen, *rest)


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    make_environment()
    if arguments[0] == "test":
        return test(arguments[1:])
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([str(PYTHON), "-m", "histoscale.launch.cli", *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
