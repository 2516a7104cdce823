"""A released encoder through torch.hub, from a checkout of this repository:

    torch.hub.load("CHECKOUT", "histoscale", "runs/release", source="local")
"""

import os
import sys
from pathlib import Path
from typing import Any

dependencies = ["torch", "timm", "safetensors", "fsspec", "hydra"]

sys.path.append(str(Path(__file__).resolve().parent / ".ns"))  # where histoscale is not installed


def histoscale(release: str, **options: Any) -> Any:
    """The encoder of a release, a checkpoint or another name that `encoder=` takes (a folder or a URI), as timm's module in eval
    mode, float32, on the CPU. Its pretrained_cfg holds its size, mean and deviation for timm.data.resolve_model_data_config.

    options: of the storage by scheme, as storage.options: az={"account_name": …}. Nothing pickled is read.
    Raises EncoderError, CheckpointError, StorageError.
    """
    from histoscale.data.storage import Store
    from histoscale.eval.architecture import read_architecture
    from histoscale.eval.encoder import open_encoder
    from histoscale.launch.config import load

    given = [f"storage.options.{scheme}.{name}={value!r}" for scheme, each in options.items() for name, value in each.items()]
    store = Store(load("embed", ["encoder=given", "catalog=none", "out=none", *given]).config.storage)
    name = os.path.expanduser(release)
    known, model = read_architecture(name, store), open_encoder(name, store).model
    if model is None:
        raise ValueError(f"{release} has no network: expected a release, a checkpoint, timm:<name> or hf:<name or folder>")
    size = (3, known.size_px, known.size_px)
    seen = {"input_size": size, "mean": known.mean, "std": known.std, "interpolation": known.interpolation, "crop_pct": 1.0}
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), **seen}
    return model
