"""Is this machine ready? Checks torch and the GPU, the decoders, OpenSlide, memory for workers, open files, write access.

    histoscale doctor
    histoscale doctor store=az://container/slides.csv      # also: can that file be read?

A line is ok, WARN (work goes on, slower or with less room) or FAIL (commands cannot run, or the store that was asked for does not
answer); with a FAIL it ends with code 2. It looks anew each time.
"""

import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.journal import Journal, JournalConfig
from histoscale.data.storage import StorageConfig, Store
from histoscale.launch.config import ConfigError

RESULT: tuple[str, ...] = ()
REPEATS = True  # a machine changes
MIN_FREE_BYTES = 1 << 30  # doctor warns
LEAST_FREE_BYTES = 1 << 27  # no command starts
MIN_OPEN_FILES = 1024
MIN_SHARED_BYTES = 1 << 30


@dataclass(frozen=True)
class Found:
    """level: `ok`, `WARN` or `FAIL`."""

    level: str
    text: str


class NotReady(ConfigError):
    """What was asked for, or what every command needs, is missing; the message names it."""


@dataclass(frozen=True)
class Config:
    """store: a file of an object store whose size is asked for, or null."""

    store: str | None
    out: str
    storage: StorageConfig
    logging: JournalConfig


def quick_check(out: Path) -> None:
    """What every command checks first. Raises OSError when `out` cannot be written or its disk is nearly full."""
    folder = out
    while not folder.exists():
        folder = folder.parent
    if out.exists() and not out.is_dir():
        raise OSError(f"out={out} is a file; give a folder")
    if not os.access(folder, os.W_OK):
        raise OSError(f"out={out} cannot be written: no write access to {folder}")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise OSError(f"out={out}: {free >> 20} MiB free on its disk; at least {LEAST_FREE_BYTES >> 20} MiB are needed")


def run(config: Config, journal: Journal) -> dict[str, Any]:
    """Raises NotReady where a check fails; the summary is written before."""
    checks = {
        "python": _python(),
        "torch": _torch(),
        "decoders": _decoders(),
        "jpeg in place": _jpeg_in_place(),
        "openslide": _openslide(),
        "shared memory": _shared_memory(),
        "open files": _open_files(),
        "disk": _disk(Path(config.out)),
    }
    if config.store is not None:
        checks["store"] = _store(config.store, config.storage)
    for name, found in checks.items():
        print(f"{found.level:<4} {name:<14} {found.text}")
    warned, failed = ([name for name, found in checks.items() if found.level == level] for level in ("WARN", "FAIL"))
    summary = {
        "doctor": {name: {"ok": found.level == "ok", "level": found.level, "text": found.text} for name, found in checks.items()}
    }
    if failed:
        journal.path("summary.json").unlink(missing_ok=True)
        journal.summary(summary)
        raise NotReady(f"not ready: {'; '.join(f'{name}: {checks[name].text}' for name in failed)}")
    print(f"ready; look at: {', '.join(warned)}" if warned else "ready")
    return summary


def _needed(good: bool, text: str) -> Found:
    return Found("ok" if good else "FAIL", text)


def _wanted(good: bool, text: str) -> Found:
    return Found("ok" if good else "WARN", text)


def _python() -> Found:
    return _needed(sys.version_info >= (3, 11), f"{sys.version.split()[0]} on {os.cpu_count()} cores")


def _torch() -> Found:
    import torch

    try:
        import torchvision

        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    except RuntimeError as error:  # a torch build that torchvision was not made for
        return _needed(False, f"torch {torch.__version__} and torchvision do not fit: {error}")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return _needed(True, f"{versions}; CUDA {torch.version.cuda}: {names}; bf16 {torch.cuda.is_bf16_supported()}")
    return _needed(True, f"{versions}; no GPU: CPU only ({torch.get_num_threads()} threads)")


def _decoders() -> Found:
    import imagecodecs
    import numpy as np
    import simplejpeg

    flat = np.full((16, 16, 3), 128, np.uint8)
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(flat, quality=95))
    good = bool(np.abs(decoded.astype(int) - 128).max() <= 2) and bool(imagecodecs.JPEG2K.available)
    versions = f"simplejpeg {simplejpeg.__version__}, imagecodecs {imagecodecs.__version__}"
    return _needed(good, f"{versions} (JPEG 2000: {imagecodecs.JPEG2K.available})")


def _jpeg_in_place() -> Found:
    """Only speed: the pixels are the same without it."""
    from histoscale.data.readers.codec import jpegparts

    if jpegparts is not None:
        return _wanted(True, "compiled: JPEG tiles decode straight into their region")
    how = "install a C compiler and libjpeg-turbo's headers (Debian: gcc libjpeg62-turbo-dev; Ubuntu: gcc libjpeg-turbo8-dev)"
    slow = "not compiled, tiles decode whole and are copied, up to a fifth slower"
    return _wanted(False, f"{slow}: {how}, then install histoscale again")


def _openslide() -> Found:
    import openslide

    return _needed(True, f"OpenSlide {openslide.__library_version__} (python {openslide.__version__})")


def _shared_memory() -> Found:
    path = Path("/dev/shm")
    if not path.exists():
        return _wanted(True, "no /dev/shm on this system")
    free = shutil.disk_usage(path).free
    hint = "" if free >= MIN_SHARED_BYTES else "; workers hand patches over through it: give the container --shm-size=8g"
    return _wanted(free >= MIN_SHARED_BYTES, f"{free / 2**30:.1f} GiB free{hint}")


def _open_files() -> Found:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hint = "" if soft >= MIN_OPEN_FILES else f"; `ulimit -n {min(hard, 65536)}` raises it"
    return _wanted(soft >= MIN_OPEN_FILES, f"{soft} (limit {hard}){hint}")


def _disk(out: Path) -> Found:
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return _wanted(free >= MIN_FREE_BYTES, f"{free / 2**30:.1f} GiB free at {folder}")


def _store(uri: str, storage: StorageConfig) -> Found:
    try:
        found = Store(storage).fingerprint(uri)
    except (OSError, ValueError) as error:
        return _needed(False, str(error))
    return _needed(True, f"{uri}: {found.size} bytes")


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("doctor", sys.argv[1:]))
