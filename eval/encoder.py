"""Any encoder as one thing: uint8 patches in, a CLS vector and patch tokens out, with its own preprocessing and a hash.

A spec is a release folder or URI, a checkpoint (`step-N` or a run's folder), `timm:<name>`, `hf:<name or folder>` (a model of
transformers), `hf-hub:<name or folder>` (one of timm on the hub), `random:<one of these>` or `colour`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from histoscale.data.storage import Missing, Store
from histoscale.eval import huggingface
from histoscale.eval.architecture import Architecture, is_release, read_architecture, untrained
from histoscale.eval.colour import colour_features
from histoscale.eval.hub import EncoderError, check_safetensors, model_folder
from histoscale.eval.pool import patch_mean
from histoscale.eval.resolution import fitted
from histoscale.pretrain.checkpoint import read_checkpoint
from histoscale.pretrain.release import read_backbone
from histoscale.pretrain.tensorfile import TensorFileError, read_header

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COLOUR_NUMBERS = 42

# uint8 [B, 3, H, W], or float32 [B, 3, S, S] in 0..1 of the encoder's size -> cls [B, D], patches [B, N, D], on its device
Tokens = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Encoder:
    """Patches of any size are resized to `size_px` (None: taken as they are), so `effective_mpp` says what it really sees: the
    shorter side by `interpolation`, antialiased, then the centre.

    hash: of weights, architecture, preprocessing and precision. model: the module, None for `colour`.
    mpps, mpp, tile_px, transductive: as in Architecture.
    """

    name: str
    width: int
    size_px: int | None
    mpps: tuple[float, ...]
    mpp: float | None
    tile_px: int | None
    transductive: bool | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    precision: str
    hash: str
    device: torch.device
    model: nn.Module | None
    tokens: Tokens

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W], or float32 [B, 3, S, S] in 0..1 -> cls [B, D], patches [B, N, D]; float32 on the CPU.

        Raises EncoderError for anything else.
        """
        cls, patches = self.tokens(self._checked(pixels))
        return cls.float().cpu(), patches.float().cpu()

    @torch.inference_mode()
    def vectors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `encoder(pixels)`, but cls [B, D] and the mean of the patch tokens [B, D] ([B, 0] without tokens)."""
        cls, patches = self.tokens(self._checked(pixels))
        mean = patch_mean(patches.float()).cpu()
        return cls.float().cpu().clone(), mean  # a view would keep all tokens in memory

    def effective_mpp(self, mpp: float, patch_px: int) -> float:
        """µm per pixel that the encoder sees in patches of `patch_px` pixels at `mpp`."""
        return mpp if self.size_px is None else mpp * patch_px / self.size_px

    def _checked(self, pixels: Tensor) -> Tensor:
        right = pixels.ndim == 4 and pixels.shape[1] == 3
        ready = pixels.dtype == torch.float32 and self.size_px is not None and pixels.shape[2:] == (self.size_px, self.size_px)
        if not right or not (pixels.dtype == torch.uint8 or ready):
            own = "" if self.size_px is None else f", or float32 [B, 3, {self.size_px}, {self.size_px}] in 0..1"
            raise EncoderError(f"pixels are {pixels.dtype} {list(pixels.shape)}: expected uint8 [B, 3, H, W]{own}")
        return pixels.to(self.device)


def open_encoder(spec: str, store: Store, device: torch.device | str = "cpu", precision: str = "fp32", seed: int = 0) -> Encoder:
    """Open what `spec` names; `seed` numbers the initialisation of `random:`.

    precision: `fp32`, `bf16` or `fp16` (autocast of the model).
    Raises EncoderError for a spec, file or weight that does not fit; CheckpointError and StorageError from the readers.
    """
    place = torch.device(device)
    if precision not in PRECISIONS:
        raise EncoderError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if spec == "colour":
        return _colour_encoder(place)
    if spec.startswith("random:"):
        architecture = read_architecture(spec.removeprefix("random:"), store)
        return encoder_of(untrained(architecture, seed), architecture, f"{spec} #{seed}", place, precision)
    architecture = read_architecture(spec, store)
    if spec.startswith("timm:"):
        return encoder_of(_timm_pretrained(architecture), architecture, spec, place, precision)
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:")
        network = huggingface.load(model_folder(name), architecture.name, architecture.model_args, architecture.size_px, name)
        return encoder_of(network, architecture, spec, place, precision)
    model = architecture.build()
    _fill(model, _weights(spec, store), spec)
    return encoder_of(model, architecture, spec, place, precision)


def random_floor_spec(spec: str) -> str | None:
    """The spec of the untrained encoder to set beside `spec`; None for `colour`, which has no architecture."""
    if spec == "colour":
        return None
    return spec if spec.startswith("random:") else f"random:{spec}"


def encoder_of(model: nn.Module, architecture: Architecture, name: str, device: torch.device, precision: str) -> Encoder:
    """Wrap a model with timm's forward as an encoder; the model is moved to `device`."""
    model = model.to(device).eval()
    side, unread = architecture.size_px, getattr(model, "unread", ())
    facts = {"architecture": architecture.name, "args": architecture.model_args, "size_px": side, "mean": architecture.mean,
             "std": architecture.std, "interpolation": architecture.interpolation, "precision": precision}  # fmt: skip
    return Encoder(
        name=name,
        width=int(model.num_features),  # type: ignore[arg-type]
        size_px=side,
        mpps=architecture.mpps,
        mpp=architecture.mpp,
        tile_px=architecture.tile_px,
        transductive=architecture.transductive,
        mean=architecture.mean,
        std=architecture.std,
        interpolation=architecture.interpolation,
        precision=precision,
        hash=weights_hash({n: x for n, x in model.state_dict().items() if not any(part in n for part in unread)}, facts),
        device=device,
        model=model,
        tokens=tokens_of(model, architecture, device, precision),
    )


def tokens_of(model: nn.Module, architecture: Architecture, device: torch.device, precision: str) -> Tokens:
    """Preprocessing and forward of a model on `device`, which may be one that is being trained."""
    mean = torch.tensor(architecture.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(architecture.std, device=device).view(1, 3, 1, 1)
    side, dtype = architecture.size_px, PRECISIONS[precision]

    def tokens(pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = fitted(pixels, side, architecture.interpolation) if pixels.dtype == torch.uint8 else pixels
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            features = model.forward_features((x - mean) / std)  # type: ignore[operator]
        return split_tokens(features, model)

    return tokens


def split_tokens(features: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """timm's `forward_features` -> cls [B, D], patches [B, N, D]; registers belong to neither.

    A network without a CLS token (convolutional, Swin) gives the mean of its map in its place. Raises EncoderError for other
    shapes.
    """
    width = int(model.num_features)  # type: ignore[arg-type]
    if features.ndim == 4:
        features = (features.permute(0, 2, 3, 1) if features.shape[1] == width else features).flatten(1, 2)
    if features.ndim != 3 or features.shape[2] != width:
        raise EncoderError(f"forward_features of {type(model).__name__} gives {list(features.shape)}: expected [B, N, {width}]")
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    patches = features[:, prefix:]
    return (features[:, 0] if prefix else patches.mean(dim=1)), patches


def weights_hash(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """sha256 over facts and over name, dtype, shape and bytes of every tensor: 16 hex digits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(weights):
        x = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# Where weights come from.


def _timm_pretrained(architecture: Architecture) -> nn.Module:
    try:
        return timm.create_model(architecture.name, pretrained=True, num_classes=0, **architecture.model_args)
    except (OSError, RuntimeError) as error:  # offline, gated, or without weights
        raise EncoderError(
            f"no weights for timm:{architecture.name} ({error}); offline, give a release folder, "
            f"or random:{architecture.name} for the untrained network"
        ) from error


def _weights(spec: str, store: Store) -> dict[str, Tensor]:
    if spec.startswith("hf-hub:"):
        folder = model_folder(spec.removeprefix("hf-hub:"))
        check_safetensors(folder, spec)
        spec = str(folder)
    if not is_release(spec, store):
        return read_backbone(read_checkpoint(spec), "teacher").state_dict()
    try:
        path = store.local(f"{spec}/model.safetensors")
        read_header(path)
        return load_file(path)
    except (SafetensorError, TensorFileError) as error:
        raise EncoderError(f"{spec}/model.safetensors cannot be read: {error}") from error
    except Missing as error:
        raise EncoderError(f"{spec} went away while it was read: {error}") from error


def _fill(model: nn.Module, weights: Mapping[str, Tensor], spec: str) -> None:
    """All of the weights or none: a partial load is an error that names the tensors. A classifier is left out."""
    own, head = model.state_dict(), str(getattr(model, "pretrained_cfg", {}).get("classifier") or "")
    weights = {name: x for name, x in weights.items() if name in own or not head or not name.startswith(f"{head}.")}
    wrong = sorted(own.keys() ^ weights.keys()) or sorted(n for n in own if own[n].shape != weights[n].shape)
    if wrong:
        raise EncoderError(f"the weights of {spec} do not fit its config in {len(wrong)} tensors: {', '.join(wrong[:4])}")
    model.load_state_dict(weights)


def _colour_encoder(device: torch.device) -> Encoder:
    def tokens(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.from_numpy(colour_features(pixels.cpu().numpy()))
        return found, found.new_zeros(len(found), 0, COLOUR_NUMBERS)

    digest = hashlib.sha256(b"colour statistics, 42 numbers").hexdigest()[:16]
    return Encoder(
        name="colour",
        width=COLOUR_NUMBERS,
        size_px=None,
        mpps=(),
        mpp=None,
        tile_px=None,
        transductive=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bicubic",  # of nothing
        precision="fp32",
        hash=digest,
        device=device,
        model=None,
        tokens=tokens,
    )
