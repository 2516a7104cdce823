"""What is read as trained weights: checkpoints, start points and releases, and what a right result of each is."""

import hashlib
import json
from pathlib import Path

import torch
from fuzz.engine import Target
from fuzz.foreign import CUT, JSON
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from histoscale.data.ranks import Ranks
from histoscale.data.storage import StorageConfig, Store
from histoscale.eval.architecture import read_architecture
from histoscale.eval.hub import EncoderError
from histoscale.pretrain.checkpoint import CheckpointError, read_checkpoint, read_tensors, write_checkpoint
from histoscale.pretrain.start import StartConfig, StartError, load_start


def targets(folder: Path) -> dict[str, Target]:
    """Every such parser, with files below `folder`."""
    return {"checkpoint": _checkpoint(folder), "weights": _weights(folder), "release": _release(folder)}


def _checkpoint(folder: Path) -> Target:
    """state.json, then the shard; the checksums of the shard are made right, as whoever means harm would."""
    ranks = Ranks(0, 1, 0, torch.device("cpu"), False)
    tensors = {"teacher.backbone.w": torch.ones(3, 4), "step": torch.tensor(2), "empty": torch.zeros(0, 3)}
    path = write_checkpoint(folder / "run", 1, tensors, {"identity": {"model": {}}}, ranks)
    (shard,) = path.glob("*.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["shards"] = {shard.name: {"size": -999, "sha256": "SHA256"}}
    seed = json.dumps(state).encode() + CUT + shard.read_bytes()

    def call(data: bytes) -> None:
        text, _, weights = data.partition(CUT)
        shard.write_bytes(weights)
        right = text.replace(b"-999", b"%d" % len(weights)).replace(b"SHA256", hashlib.sha256(weights).hexdigest().encode())
        (path / "state.json").write_bytes(right)
        found = read_checkpoint(path)
        assert len(found.hash) == len(found.identity) == 64
        assert all(x.shape == found.tensors[f"teacher.{name}"].shape for name, x in read_tensors(found, "teacher.").items())

    words = [*JSON, b'"dtype":"F32"', b'"BOOL"', b'"shape":[', b'"data_offsets":[0,', b"saved_offsets", b"DCP_SHARDING_INFO"]
    return Target([seed], call, (CheckpointError,), words)


def _weights(folder: Path) -> Target:
    path = folder / "model.safetensors"
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    own = {name: x.contiguous() for name, x in vit.state_dict().items()}
    config = StartConfig(str(path), "both", False, False, "timm", ["*"], ["*"], 0)

    def call(data: bytes) -> None:
        path.write_bytes(data)
        load_start(vit, config)

    seeds = [save(own), save({names.get(name, f"encoder.layer.0.{name}"): x for name, x in own.items()})]
    words = [
        *JSON,
        b'"F16"',
        b'"F4"',
        b'"shape":[',
        b"blocks.0.attn.qkv.weight",
        b"attention.attention.query.weight",
        b"pos_embed",
    ]
    return Target(seeds, call, (StartError,), words)


def _release(folder: Path) -> Target:
    """config.json, then MODEL.json; no network is built of them."""
    home = folder / "release"
    home.mkdir()
    (home / "model.safetensors").touch()
    store = Store(StorageConfig({}, "fsspec", str(folder / "cache"), 1 << 30, 20.0, 5.0, 60.0))
    looks = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32}, "pretrained_cfg": looks}
    card = {"mpp": {"default": 0.5, "trained_at": [0.5, 1.0]}, "tile_px": 224, "transductive": False, "data": {"corpora": ["a"]}}

    def call(data: bytes) -> None:
        first, _, second = data.partition(CUT)
        (home / "config.json").write_bytes(first)
        (home / "MODEL.json").write_bytes(second)
        found = read_architecture(str(home), store)
        assert not found.model_args.keys() & {"checkpoint_path", "pretrained", "pretrained_cfg"}

    words = [*JSON, b'"checkpoint_path":"x"', b'"pretrained":true', b'"hf-hub:a/b"', b'"local-dir:x"']
    return Target([json.dumps(config).encode() + CUT + json.dumps(card).encode()], call, (EncoderError,), words)
