"""Models of transformers as encoders: safetensors alone, its own classes alone, and the image processor's numbers.

Code that a repository brings along (`auto_map`) is never run. Needs the extra `hf`.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from histoscale.eval.hub import EncoderError, check_safetensors

# What a configuration says of files and versions, not of the network.
NOT_THE_NETWORK = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map")
# Tensors that `last_hidden_state` of whole images never reads: a file may lack them, and no hash counts them.
UNREAD = ("pooler.", "mask_token")
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


class Backbone(nn.Module):
    """A transformers model under timm's names: images float [B, 3, S, S] -> `forward_features` [B, N, D] or a map [B, D, h, w].

    Of the N tokens, `num_prefix_tokens` come before the patches: a class token, registers, a distillation token; 0 for none.
    Raises EncoderError for a network that cannot be fed with images of `side` px or gives other shapes.
    """

    unread = UNREAD

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model = model
        self.resized = _is_resized(model, side)
        config: Any = model.config
        with quiet(), torch.device("meta"):
            shape = _trial(transformers().AutoModel.from_config(config).eval(), side, self.resized)
        self.num_features = int(shape[1] if len(shape) == 4 else shape[2])
        self.num_prefix_tokens = 0 if len(shape) == 4 else _prefix(config, side, int(shape[1]))

    def forward_features(self, x: Tensor) -> Tensor:
        return _hidden(self.model, x, self.resized)


def transformers() -> ModuleType:
    """Imported when it is needed: it takes seconds, and is an extra."""
    try:
        import transformers as library
    except ImportError as error:
        raise EncoderError("hf: needs the package transformers: install histoscale[hf]") from error
    return library


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and tables from transformers: what they would tell is checked here, and raised."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def network_args(config: dict[str, Any], spec: str) -> tuple[str, dict[str, Any]]:
    """`config.json` -> model type, and everything that makes the network. Raises EncoderError for a type that is not built in."""
    if "model_type" not in config:
        hint = f"it is in timm's form, give it as hf-hub:{spec}" if "architecture" in config else "it is not theirs"
        raise EncoderError(f"hf:{spec}: its config.json names no model_type of transformers ({hint})")
    name = str(config["model_type"])
    if name not in transformers().CONFIG_MAPPING:
        code = "; it asks for code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise EncoderError(f"hf:{spec}: transformers {transformers().__version__} has no model type {name!r}{code}")
    return name, {key: value for key, value in config.items() if key not in NOT_THE_NETWORK}


def build(model_type: str, args: dict[str, Any], side: int, plain: bool) -> Backbone:
    """An untrained network at its own initialisation. plain: with LayerScale at 1, which is none."""
    config = _config(model_type, args)
    for name in ("layerscale_value", "layer_scale_init_value") if plain else ():
        if hasattr(config, name):
            setattr(config, name, 1.0)
    try:
        with quiet():
            return Backbone(transformers().AutoModel.from_config(config).eval(), side)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _unusable(f"the model type {model_type!r} with {args}", error) from error


def load(folder: Path, model_type: str, args: dict[str, Any], side: int, spec: str) -> Backbone:
    """The network with the weights of `folder`, float32. Raises EncoderError: pickled, damaged, or not all of the weights."""
    check_safetensors(folder, f"hf:{spec}")
    library = transformers()
    try:
        with quiet():
            model, said = library.AutoModel.from_pretrained(
                folder, config=_config(model_type, args), dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                local_files_only=True, output_loading_info=True,
            )  # fmt: skip
    except (OSError, RuntimeError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise EncoderError(f"hf:{spec}: its weights cannot be read ({_line(error)})") from error
    missing = sorted(name for name in said["missing_keys"] if not any(part in name for part in UNREAD))
    if missing:
        raise EncoderError(f"hf:{spec}: its weights lack {len(missing)} tensors of its config: {', '.join(missing[:4])}")
    return Backbone(model.eval(), side)


def preprocessing(folder: Path, spec: str) -> dict[str, Any]:
    """size_px, mean, std and interpolation from the image processor's configuration.

    The margin that some processors cut off (shorter side to 256, centre of 224) is not cut: labelled patches are crops already.
    Raises EncoderError where it is missing, or asks for what is no antialiased resize, division by 255 and normalisation.
    """
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise EncoderError(
            f"hf:{spec}: no preprocessor_config.json says how its images are prepared; save one beside its config.json "
            "(image_processor_type, image_mean, image_std, resample, size)"
        )
    try:
        with quiet():
            found = transformers().AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise EncoderError(f"hf:{spec}: its preprocessor_config.json cannot be used ({_line(error)})") from error
    crop = getattr(found, "do_center_crop", False) and getattr(found, "crop_size", None)
    sides = _sides(crop or found.size)
    if len(sides) != 1:
        raise EncoderError(f"hf:{spec}: its processor makes images of {crop or found.size}: expected one square size")
    if not found.do_rescale or not math.isclose(found.rescale_factor, 1 / 255, rel_tol=1e-6):
        raise EncoderError(f"hf:{spec}: its processor multiplies by {found.rescale_factor}: expected 1/255, so pixels in 0..1")
    resample = int(found.resample) if found.resample is not None else None
    if resample not in RESAMPLING:
        raise EncoderError(f"hf:{spec}: its processor has resample={found.resample}: expected 2 (bilinear) or 3 (bicubic)")
    mean, std = (found.image_mean, found.image_std) if found.do_normalize else ([0.0] * 3, [1.0] * 3)
    return {"size_px": sides.pop(), "mean": mean, "std": std, "interpolation": RESAMPLING[resample]}


def _sides(size: Any) -> set[int]:
    """Of transformers' {"height", "width"} or {"shortest_edge"}; a plain number in old files."""
    if isinstance(size, int):
        return {size}
    values = {name: size.get(name) for name in ("height", "width", "shortest_edge")}
    return {int(value) for value in values.values() if value is not None}


def _config(model_type: str, args: dict[str, Any]) -> Any:
    try:
        return transformers().CONFIG_MAPPING[model_type].from_dict(dict(args))
    except Exception as error:  # its configurations check themselves, each with errors of its own kind
        raise _unusable(f"the model type {model_type!r} with {args}", error) from error


def _is_resized(model: nn.Module, side: int) -> bool:
    """Whether the position table must be told to stretch: ViT's does it on request, Dinov2's by itself."""
    forward: Any = model.forward
    native = getattr(model.config, "image_size", side)
    return "interpolate_pos_encoding" in inspect.signature(forward).parameters and native not in (side, [side, side])


def _hidden(model: nn.Module, x: Tensor, resized: bool) -> Tensor:
    return model(pixel_values=x, **({"interpolate_pos_encoding": True} if resized else {})).last_hidden_state


@torch.inference_mode()
def _trial(model: nn.Module, side: int, resized: bool) -> list[int]:
    """Shape of the features of one image, without computing any."""
    name = type(model).__name__
    try:
        shape = list(_hidden(model, torch.zeros(1, 3, side, side, device="meta"), resized).shape)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise EncoderError(f"{name} of transformers takes no images of {side} px alone ({_line(error)})") from error
    if len(shape) not in (3, 4):
        raise EncoderError(f"last_hidden_state of {name} is {shape}: expected [B, N, D] or [B, D, h, w]")
    return shape


def _prefix(config: Any, side: int, tokens: int) -> int:
    """How many tokens stand before those of the patches. Raises EncoderError where they cannot be told apart."""
    patch = getattr(config, "patch_size", None)
    if patch is None or hasattr(config, "depths"):  # a pyramid: its last grid is a square
        candidates = [k for k in (0, 1) if tokens > k and math.isqrt(tokens - k) ** 2 == tokens - k]
    else:
        down, across = (patch, patch) if isinstance(patch, int) else patch
        registers = getattr(config, "num_register_tokens", 0) or 0
        grid = (side // down) * (side // across)
        candidates = [k for k in (0, 1 + registers, 2) if tokens == grid + k]  # 2: DeiT's class and distillation tokens
    if not candidates:
        raise EncoderError(
            f"{config.model_type} gives {tokens} tokens for images of {side} px: expected one for each patch of {patch} px, "
            "and before them none, or a class token and the registers of its config"
        )
    return candidates[0]


def _unusable(what: str, error: Exception) -> EncoderError:
    if isinstance(error, EncoderError):
        return error
    return EncoderError(f"transformers {transformers().__version__} cannot build {what[:300]} ({_line(error)})")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
