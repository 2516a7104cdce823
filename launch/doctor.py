"""Is this machine ready? Checks torch and the GPU, the decoders, OpenSlide, memory for workers, open files, write access.

    histoscale doctor
    histoscale doctor store=az://container/slides       (also: can that store be listed?)
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

RESULT: tuple[str, ...] = ()
MIN_FREE_BYTES = 1 << 30  # doctor warns
LEAST_FREE_BYTES = 1 << 27  # no command starts
MIN_OPEN_FILES = 1024
MIN_SHARED_BYTES = 1 << 30


@dataclass(frozen=True)
class Config:
    """store: a file of an object store to read the first bytes of, or null."""

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
    for name, (good, text) in checks.items():
        print(f"{'ok  ' if good else 'WARN'} {name:<14} {text}")
    bad = [name for name, (good, _) in checks.items() if not good]
    print("ready" if not bad else f"look at: {', '.join(bad)}")
    return {"doctor": {name: {"ok": good, "text": text} for name, (good, text) in checks.items()}}


def _python() -> tuple[bool, str]:
    return sys.version_info >= (3, 11), f"{sys.version.split()[0]} on {os.cpu_count()} cores"


def _torch() -> tuple[bool, str]:
    import torch

    try:
        import torchvision

        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    except RuntimeError as error:  # a torch build that torchvision was not made for
        return False, f"torch {torch.__version__} and torchvision do not fit: {error}"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return True, f"{versions}; CUDA {torch.version.cuda}: {names}; bf16 {torch.cuda.is_bf16_supported()}"
    return True, f"{versions}; no GPU: CPU only ({torch.get_num_threads()} threads)"


def _decoders() -> tuple[bool, str]:
    import imagecodecs
    import numpy as np
    import simplejpeg

    flat = np.full((16, 16, 3), 128, np.uint8)
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(flat, quality=95))
    good = bool(np.abs(decoded.astype(int) - 128).max() <= 2) and bool(imagecodecs.JPEG2K.available)
    versions = f"simplejpeg {simplejpeg.__version__}, imagecodecs {imagecodecs.__version__}"
    return good, f"{versions} (JPEG 2000: {imagecodecs.JPEG2K.available})"


def _jpeg_in_place() -> tuple[bool, str]:
    """Only speed: the pixels are the same without it."""
    from histoscale.data.readers.codec import jpegparts

    if jpegparts is not None:
        return True, "compiled: JPEG tiles decode straight into their region"
    how = "install a C compiler and libjpeg-turbo's headers (Debian: gcc libjpeg62-turbo-dev; Ubuntu: gcc libjpeg-turbo8-dev)"
    return False, f"not compiled, tiles decode whole and are copied, up to a fifth slower: {how}, then install histoscale again"


def _openslide() -> tuple[bool, str]:
    import openslide

    return True, f"OpenSlide {openslide.__library_version__} (python {openslide.__version__})"


def _shared_memory() -> tuple[bool, str]:
    path = Path("/dev/shm")
    if not path.exists():
        return True, "no /dev/shm on this system"
    free = shutil.disk_usage(path).free
    hint = "" if free >= MIN_SHARED_BYTES else "; workers hand patches over through it: give the container --shm-size=8g"
    return free >= MIN_SHARED_BYTES, f"{free / 2**30:.1f} GiB free{hint}"


def _open_files() -> tuple[bool, str]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hint = "" if soft >= MIN_OPEN_FILES else f"; `ulimit -n {min(hard, 65536)}` raises it"
    return soft >= MIN_OPEN_FILES, f"{soft} (limit {hard}){hint}"


def _disk(out: Path) -> tuple[bool, str]:
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return free >= MIN_FREE_BYTES, f"{free / 2**30:.1f} GiB free at {folder}"


def _store(uri: str, storage: StorageConfig) -> tuple[bool, str]:
    try:
        fingerprint = Store(storage).fingerprint(uri)
    except OSError as error:
        return False, f"{uri}: {error}"
    return True, f"{uri}: {fingerprint.size} bytes"


if __name__ == "__main__":
    from histoscale.launch.run import execute

    sys.exit(execute("doctor", sys.argv[1:]))
