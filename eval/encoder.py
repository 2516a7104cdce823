"""Any encoder as one thing: uint8 patches in, a CLS vector and patch tokens out, with its own preprocessing and a hash.

A spec is a release folder or URI, a checkpoint (`step-N` or a run's folder), `timm:<name>`, `random:<folder or timm name>`
or `colour`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from histoscale.data.keys import key
from histoscale.data.storage import Missing, Store
from histoscale.eval.colour import colour_features
from histoscale.eval.pool import patch_mean
from histoscale.pretrain.backbone import ModelConfig, timm_arguments
from histoscale.pretrain.checkpoint import CheckpointError, CheckpointState, read_checkpoint
from histoscale.pretrain.release import model_config, read_backbone

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COLOUR_NUMBERS = 42

Tokens = Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 [B, 3, H, W] -> cls [B, D], patches [B, N, D], on the encoder's device


class EncoderError(ValueError):
    """A spec that names no usable encoder; the message says what was expected."""


@dataclass(frozen=True)
class Architecture:
    """What must be known to build an encoder, weights aside.

    mpps: µm per pixel it was trained at, tile_px: the tiles it was trained on, transductive: whether reported patients were among
    them; empty and None where nobody says.
    """

    name: str
    model_args: dict[str, Any]
    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    mpps: tuple[float, ...]
    tile_px: int | None
    transductive: bool | None

    def build(self, **overrides: Any) -> nn.Module:
        """An untrained timm model without a classifier."""
        try:
            return timm.create_model(self.name, pretrained=False, **{"num_classes": 0, **self.model_args, **overrides}).eval()
        except (RuntimeError, TypeError) as error:
            raise EncoderError(f"timm {timm.__version__} cannot build {self.name!r} with {self.model_args}: {error}") from error


@dataclass(frozen=True)
class Encoder:
    """Patches of any size are resized to `size_px` (None: taken as they are), so `effective_mpp` says what it really sees.

    hash: of weights, architecture, preprocessing and precision. model: the timm module, None for `colour`.
    mpps, tile_px, transductive: as in Architecture.
    """

    name: str
    width: int
    size_px: int | None
    mpps: tuple[float, ...]
    tile_px: int | None
    transductive: bool | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    hash: str
    device: torch.device
    model: nn.Module | None
    tokens: Tokens

    @property
    def mpp(self) -> float | None:
        """The magnification it was trained at, where that is one."""
        return self.mpps[0] if len(self.mpps) == 1 else None

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> cls [B, D], patches [B, N, D]; float32 on the CPU. Raises EncoderError for anything else."""
        cls, patches = self.tokens(self._checked(pixels))
        return cls.float().cpu(), patches.float().cpu()

    @torch.inference_mode()
    def vectors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> cls [B, D], mean of the patch tokens [B, D] ([B, 0] without tokens); float32 on the CPU."""
        cls, patches = self.tokens(self._checked(pixels))
        mean = patch_mean(patches.float()).cpu()
        return cls.float().cpu().clone(), mean  # a view would keep all tokens in memory

    def effective_mpp(self, mpp: float, patch_px: int) -> float:
        """µm per pixel that the encoder sees in patches of `patch_px` pixels at `mpp`."""
        return mpp if self.size_px is None else mpp * patch_px / self.size_px

    def _checked(self, pixels: Tensor) -> Tensor:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise EncoderError(f"pixels are {pixels.dtype} {list(pixels.shape)}: expected uint8 [B, 3, H, W]")
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
    model = architecture.build()
    _fill(model, _weights(spec, store), spec)
    return encoder_of(model, architecture, spec, place, precision)


def random_floor_spec(spec: str) -> str | None:
    """The spec of the untrained encoder to set beside `spec`; None for `colour`, which has no architecture."""
    if spec == "colour":
        return None
    return spec if spec.startswith("random:") else f"random:{spec}"


def encoder_of(model: nn.Module, architecture: Architecture, name: str, device: torch.device, precision: str) -> Encoder:
    """Wrap a timm model as an encoder; the model is moved to `device`."""
    model = model.to(device).eval()
    side = architecture.size_px
    facts = {"architecture": architecture.name, "args": architecture.model_args, "size_px": side, "mean": architecture.mean,
             "std": architecture.std, "interpolation": architecture.interpolation, "precision": precision}  # fmt: skip
    return Encoder(
        name=name,
        width=int(model.num_features),  # type: ignore[arg-type]
        size_px=side,
        mpps=architecture.mpps,
        tile_px=architecture.tile_px,
        transductive=architecture.transductive,
        mean=architecture.mean,
        std=architecture.std,
        precision=precision,
        hash=weights_hash(model.state_dict(), facts),
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
        x = pixels.float() / 255
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode=architecture.interpolation, antialias=True, align_corners=False).clamp(0, 1)
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


# Where architectures and weights come from.


def read_architecture(spec: str, store: Store) -> Architecture:
    """The architecture behind a release, a checkpoint or a timm name. Raises EncoderError when `spec` is none of them."""
    if spec.startswith("timm:") or timm.is_model(spec):
        return _timm_architecture(spec.removeprefix("timm:"))
    if _is_release(spec, store):
        config = _json(f"{spec}/config.json", store)
        card = _json(f"{spec}/MODEL.json", store) if store.exists(f"{spec}/MODEL.json") else {}
        return _architecture_of(config, card, spec)
    if Path(spec).is_dir():
        try:
            return _checkpoint_architecture(read_checkpoint(spec))
        except CheckpointError as error:
            raise EncoderError(f"{spec} is no release (config.json and model.safetensors), and no checkpoint: {error}") from error
    raise EncoderError(
        f"encoder {spec!r} is no release folder (config.json and model.safetensors), no checkpoint, no timm:<name>, "
        "no random:<folder or timm name> and not colour"
    )


def _is_release(spec: str, store: Store) -> bool:
    return store.exists(f"{spec}/config.json") and store.exists(f"{spec}/model.safetensors")


def _json(uri: str, store: Store) -> dict[str, Any]:
    try:
        return json.loads(store.read(uri))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EncoderError(f"{uri} is not JSON: {error}") from error


def _architecture_of(config: Mapping[str, Any], card: Mapping[str, Any], spec: str) -> Architecture:
    """From timm's hub form: {architecture, model_args, pretrained_cfg: {input_size, mean, std, interpolation}}."""
    try:
        preprocessing = config["pretrained_cfg"]
        return Architecture(
            name=config["architecture"],
            model_args=dict(config.get("model_args", {})),
            size_px=int(preprocessing["input_size"][-1]),
            mean=_triple(preprocessing["mean"]),
            std=_triple(preprocessing["std"]),
            interpolation=_interpolation(preprocessing["interpolation"]),
            mpps=tuple(card.get("mpp", {}).get("trained_at") or ()),
            tile_px=card.get("tile_px"),
            transductive=card.get("transductive"),
        )
    except KeyError as error:
        raise EncoderError(f"{spec}: its config lacks {error}; expected timm's hub form with a pretrained_cfg") from error


def _checkpoint_architecture(state: CheckpointState) -> Architecture:
    identity = state.facts["identity"]
    views, facts = identity["views"], identity["facts"]
    sampler = facts.get("sampler", {})
    mpps, tile_px = sampler.get("mpps") or (), sampler.get("patch_px")
    return trained_architecture(model_config(state), views["mean"], views["std"], mpps, tile_px, facts.get("transductive"))


def trained_architecture(
    model: ModelConfig,
    mean: Sequence[float],
    std: Sequence[float],
    mpps: Sequence[float],
    tile_px: int | None,
    transductive: bool | None,
) -> Architecture:
    """The architecture that `pretrain` trains with this model, on views of this mean and deviation."""
    return Architecture(
        name=model.architecture,
        model_args=timm_arguments(model),
        size_px=model.img_size,
        mean=_triple(mean),
        std=_triple(std),
        interpolation="bicubic",
        mpps=tuple(mpps),
        tile_px=tile_px,
        transductive=transductive,
    )


def _timm_architecture(name: str) -> Architecture:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        raise EncoderError(f"timm {timm.__version__} knows no model {name!r}" + (f"; it has {', '.join(close)}" if close else ""))
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    found = timm.data.resolve_model_data_config(model)
    return Architecture(
        name=name,
        model_args={},
        size_px=int(found["input_size"][-1]),
        mean=_triple(found["mean"]),
        std=_triple(found["std"]),
        interpolation=_interpolation(found["interpolation"]),
        mpps=(),
        tile_px=None,
        transductive=None,
    )


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _interpolation(name: str) -> str:
    if name not in ("bicubic", "bilinear"):
        raise EncoderError(f"interpolation is {name!r}: expected bicubic or bilinear, the antialiased ones")
    return name


def _timm_pretrained(architecture: Architecture) -> nn.Module:
    try:
        return timm.create_model(architecture.name, pretrained=True, num_classes=0, **architecture.model_args)
    except (OSError, RuntimeError) as error:  # offline, gated, or without weights
        raise EncoderError(
            f"no weights for timm:{architecture.name} ({error}); offline, give a release folder, "
            f"or random:{architecture.name} for the untrained network"
        ) from error


def _weights(spec: str, store: Store) -> dict[str, Tensor]:
    if not _is_release(spec, store):
        return read_backbone(read_checkpoint(spec), "teacher").state_dict()
    try:
        return load_file(store.local(f"{spec}/model.safetensors"))
    except SafetensorError as error:
        raise EncoderError(f"{spec}/model.safetensors cannot be read: {error}") from error
    except Missing as error:
        raise EncoderError(f"{spec} went away while it was read: {error}") from error


def _fill(model: nn.Module, weights: Mapping[str, Tensor], spec: str) -> None:
    """All of the weights or none: a partial load is an error that names the tensors."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys()) or sorted(n for n in own if own[n].shape != weights[n].shape)
    if wrong:
        raise EncoderError(f"the weights of {spec} do not fit its config in {len(wrong)} tensors: {', '.join(wrong[:4])}")
    model.load_state_dict(weights)


def untrained(architecture: Architecture, seed: int) -> nn.Module:
    """The same architecture at its own initialisation, without LayerScale: at its start that would silence every block and
    so weaken the floor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "random encoder") >> 1)
        model = architecture.build()
        if isinstance(model, VisionTransformer) and any(isinstance(m, LayerScale) for m in model.modules()):
            torch.manual_seed(key(seed, "random encoder") >> 1)
            model = architecture.build(init_values=0)  # timm drops None, and builds no LayerScale for 0
    return model


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
        tile_px=None,
        transductive=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        precision="fp32",
        hash=digest,
        device=device,
        model=None,
        tokens=tokens,
    )
