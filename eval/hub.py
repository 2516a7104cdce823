"""Folders of released models, on this machine or fetched from the Hugging Face hub: JSON and safetensors, nothing else."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from histoscale.data.jsonfiles import JsonError, read_object

# Never pickled weights and never code: what is not fetched cannot be run.
WANTED = ["*.json", "*.safetensors"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class EncoderError(ValueError):
    """A spec that names no usable encoder; the message says what was expected."""


def model_folder(name: str) -> Path:
    """`name` itself where it is a folder, else the hub's files of that repository, fetched once and then found offline too.

    Raises EncoderError where it is neither.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?", name):
        raise EncoderError(f"{name!r} is no folder, and no name that the hub could know: expected a local folder or owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (OSError, ValueError) as error:  # offline, gated, unknown
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(
            f"{name!r} is no local folder and the hub does not give it ({type(error).__name__}: {reason}); offline, give a folder"
        ) from error


def check_safetensors(folder: Path, spec: str) -> None:
    """Raises EncoderError where `folder` holds no weights that can be read without unpickling."""
    if any(folder.glob("model*.safetensors")):
        return
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise EncoderError(
            f"{spec} has only pickled weights ({pickled[0]}), which are never read: convert them to model.safetensors"
        )
    raise EncoderError(f"{spec}: {folder} holds no model.safetensors; for the untrained network, give random:{spec}")


def read_config(folder: Path, spec: str) -> dict[str, Any]:
    """`config.json` of the folder. Raises EncoderError where it is missing or not a JSON object."""
    try:
        return read_object(folder / "config.json")
    except FileNotFoundError:
        raise EncoderError(f"{spec}: {folder} holds no config.json") from None
    except JsonError as error:
        raise EncoderError(f"{folder / 'config.json'} is not JSON of a model ({error}): fetch it again") from error
