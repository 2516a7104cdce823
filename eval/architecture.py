"""What an encoder is before it has weights: the network, its preprocessing, and what it was trained on.

Read from a release folder, a checkpoint, timm, or a model of transformers.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import LayerScale
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from histoscale.data.jsonfiles import JsonError, parse_object
from histoscale.data.keys import key
from histoscale.data.storage import Store
from histoscale.eval import huggingface
from histoscale.eval.hub import EncoderError, model_folder, read_config
from histoscale.pretrain.backbone import ModelConfig, timm_arguments
from histoscale.pretrain.checkpoint import CheckpointError, CheckpointState, read_checkpoint
from histoscale.pretrain.release import default_mpp, described, model_config, network_arguments


@dataclass(frozen=True)
class Architecture:
    """What must be known to build an encoder, weights aside.

    library: `timm`, where `name` is an architecture and `model_args` its changes, or `transformers`, where they are a model type
    and its configuration. mpps: µm per pixel it was trained at, mpp: the one at which it looks unless asked otherwise, tile_px:
    the tiles it was trained on, transductive: whether reported patients were among them; empty and None where nobody says.
    """

    library: str
    name: str
    model_args: dict[str, Any]
    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    mpps: tuple[float, ...]
    mpp: float | None
    tile_px: int | None
    transductive: bool | None

    def build(self, **overrides: Any) -> nn.Module:
        """An untrained model without a classifier; the overrides are timm's."""
        if self.library == "transformers":
            return huggingface.build(self.name, self.model_args, self.size_px, plain=False)
        try:
            return timm.create_model(self.name, pretrained=False, **{"num_classes": 0, **self.model_args, **overrides}).eval()
        except (RuntimeError, TypeError) as error:
            raise EncoderError(f"timm {timm.__version__} cannot build {self.name!r} with {self.model_args}: {error}") from error


def untrained(architecture: Architecture, seed: int) -> nn.Module:
    """The same architecture at its own initialisation, without LayerScale: at its start that would silence every block and
    so weaken the floor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "random encoder") >> 1)
        if architecture.library == "transformers":
            return huggingface.build(architecture.name, architecture.model_args, architecture.size_px, plain=True)
        model = architecture.build()
        for block in model.modules():
            if isinstance(block, EvaBlock):  # its scales are drawn from no generator, and None is none
                block.gamma_1 = block.gamma_2 = None
        if isinstance(model, VisionTransformer) and any(isinstance(m, LayerScale) for m in model.modules()):
            torch.manual_seed(key(seed, "random encoder") >> 1)
            model = architecture.build(init_values=0)  # timm drops None, and builds no LayerScale for 0
    return model


# Where architectures come from.


def read_architecture(spec: str, store: Store) -> Architecture:
    """What a release, a checkpoint, or a name of timm or transformers stands for. Raises EncoderError for anything else."""
    if spec.startswith("hf:"):
        return _transformers_architecture(spec.removeprefix("hf:"))
    if spec.startswith("hf-hub:"):
        folder = model_folder(spec.removeprefix("hf-hub:"))
        return _architecture_of(read_config(folder, spec), {}, spec)
    if spec.startswith("timm:") or timm.is_model(spec):
        return _timm_architecture(spec.removeprefix("timm:"))
    if is_release(spec, store):
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
        "hf:<name or folder> or hf-hub:<name>, no random:<one of these> and not colour"
    )


def is_release(spec: str, store: Store) -> bool:
    return store.exists(f"{spec}/config.json") and store.exists(f"{spec}/model.safetensors")


def _json(uri: str, store: Store) -> dict[str, Any]:
    try:
        return parse_object(store.read(uri))
    except JsonError as error:
        raise EncoderError(f"{uri} is not JSON of a release ({error}): release it again, or fetch it again") from error


_NOT_THE_NETWORK = frozenset(inspect.signature(timm.create_model).parameters)  # among them files to unpickle, and names to fetch


def _architecture_of(config: Mapping[str, Any], card: Mapping[str, Any], spec: str) -> Architecture:
    """From timm's hub form: {architecture, model_args, pretrained_cfg: {input_size, mean, std, interpolation}}."""
    try:
        trained: Mapping[str, Any] = card.get("mpp") or {}
        mpps = tuple(float(mpp) for mpp in trained.get("trained_at") or ())
        preprocessing, args = config["pretrained_cfg"], network_arguments(config.get("model_args", {}))
        wrong = sorted(args.keys() & _NOT_THE_NETWORK)
        if wrong or not timm.is_model(config["architecture"]):
            what = f"model_args set {', '.join(wrong)}" if wrong else f"architecture is {config['architecture']!r}"
            raise EncoderError(f"{spec}: its config's {what}: expected an architecture of timm and what its network takes")
        return Architecture(
            library="timm",
            name=config["architecture"],
            model_args=args,
            size_px=int(preprocessing["input_size"][-1]),
            mean=_triple(preprocessing["mean"]),
            std=_triple(preprocessing["std"]),
            interpolation=_interpolation(preprocessing["interpolation"]),
            mpps=mpps,
            mpp=float(trained.get("default") or 0) or default_mpp(mpps, "discrete"),
            tile_px=None if card.get("tile_px") is None else int(card["tile_px"]),
            transductive=card.get("transductive"),
        )
    except KeyError as error:
        raise EncoderError(f"{spec}: its config lacks {error}; expected timm's hub form with a pretrained_cfg") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, EncoderError):
            raise
        raise EncoderError(f"{spec}: its config or card holds an odd value ({error}); expected timm's hub form") from error


def _checkpoint_architecture(state: CheckpointState) -> Architecture:
    with described(state):
        identity = state.facts["identity"]
        views, facts = identity["views"], identity["facts"]
        sampler = facts.get("sampler", {})
        mpps, tile_px = sampler.get("mpps") or (), sampler.get("patch_px")
        found = trained_architecture(model_config(state), views["mean"], views["std"], mpps, tile_px, facts.get("transductive"))
        return replace(found, mpp=default_mpp(mpps, sampler.get("magnification", "discrete")))


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
        library="timm",
        name=model.architecture,
        model_args=network_arguments(timm_arguments(model)),
        size_px=model.img_size,
        mean=_triple(mean),
        std=_triple(std),
        interpolation="bicubic",
        mpps=tuple(mpps),
        mpp=default_mpp(mpps, "discrete"),
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
        library="timm",
        name=name,
        model_args={},
        size_px=int(found["input_size"][-1]),
        mean=_triple(found["mean"]),
        std=_triple(found["std"]),
        interpolation=_interpolation(found["interpolation"]),
        mpps=(),
        mpp=None,
        tile_px=None,
        transductive=None,
    )


def _transformers_architecture(name: str) -> Architecture:
    folder = model_folder(name)
    model_type, args = huggingface.network_args(read_config(folder, f"hf:{name}"), name)
    found = huggingface.preprocessing(folder, name)
    return Architecture(
        library="transformers",
        name=model_type,
        model_args=args,
        size_px=found["size_px"],
        mean=_triple(found["mean"]),
        std=_triple(found["std"]),
        interpolation=found["interpolation"],
        mpps=(),
        mpp=None,
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
