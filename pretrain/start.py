"""Where a backbone's first weights come from: fresh, or those of timm, transformers, DINO, DINOv2, DINOv3 or a run of ours.

Names are mapped by origin, position tables are resized, and what does not fit exactly is refused unless it is allowed by name.
Only safetensors are read: nothing is unpickled.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from histoscale.data.jsonfiles import read_object
from histoscale.pretrain.checkpoint import read_checkpoint, read_tensors
from histoscale.pretrain.tensorfile import TensorFileError, read_header

RESIZE = ("timm", "dinov2")
BRANCHES = ("both", "teacher", "student")


@dataclass(frozen=True)
class StartConfig:
    """What a phase begins with. weights, in the first phase: null (fresh), `timm:NAME` or `hf:NAME` (from the hub), a safetensors
    file, a folder with model.safetensors, or a checkpoint of ours (`step-N` or a run's folder); a later phase continues the one
    before it and takes null.

    branch, heads, moments: what is taken of a checkpoint. branch: each its own ("both"), or student and teacher both from the
    "teacher" or the "student"; heads: with them the centres; moments: AdamW's.
    resize: convention for a position table of another grid, "timm" or "dinov2" (what DINOv2 without registers saw).
    may_lack, may_ignore: parameters of the model, and tensors of the file, that need no partner; names or globs of them.
    freeze_backbone_steps: the backbone's learning rate is 0 so long, while new heads find their way.
    """

    weights: str | None
    branch: str
    heads: bool
    moments: bool
    resize: str
    may_lack: list[str]
    may_ignore: list[str]
    freeze_backbone_steps: int


class StartError(ValueError):
    """Weights that cannot be read or do not fit the model; the message names tensors and what to do."""


@dataclass(frozen=True)
class Loaded:
    """What came of a start: in words for the log and the checkpoint. mask_token: [1, D] where the weights hold one."""

    said: list[str]
    mask_token: Tensor | None


def load_start(vit: nn.Module, config: StartConfig) -> Loaded:
    """Fill a backbone of timm (learned or rotary positions) with `config.weights`, in place.

    Raises StartError (nothing to read, a tensor that is missing, left over or of another shape), CheckpointError.
    """
    assert config.weights is not None
    check_start(config)
    stored = read_weights(config.weights)
    said = [f"starts from {config.weights}"]
    try:
        weights = timm_names(stored, set(vit.state_dict()))
        mask_token = weights.pop("mask_token", None)
        table, own = weights.get("pos_embed"), vit.state_dict().get("pos_embed")
        if table is not None and own is not None:
            said += _fit_positions(weights, vit, table, own, config.resize)
    except StartError:
        raise
    except (KeyError, IndexError, RuntimeError, ValueError) as error:  # a name without its partner, a shape that no network has
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise StartError(f"start.weights={config.weights} holds tensors that make up no backbone ({why})") from None
    said += _compare(weights, vit.state_dict(), config)
    missing, _ = vit.load_state_dict({name: x.float() for name, x in weights.items() if name in vit.state_dict()}, strict=False)
    if missing:
        said.append(f"keep fresh values: {', '.join(missing)}")
    mask_token = None if mask_token is None else mask_token.float().reshape(1, -1)
    return Loaded(said, mask_token)


def check_start(config: StartConfig) -> None:
    """Raises StartError for a word that is none of those a field takes."""
    for name, value, known in (("resize", config.resize, RESIZE), ("branch", config.branch, BRANCHES)):
        if value not in known:
            raise StartError(f"start.{name}={value!r}: expected one of {', '.join(known)}")


def is_checkpoint(weights: str | None) -> bool:
    """Whether `start.weights` names a checkpoint of ours, which holds more than a backbone."""
    path = Path(weights or "")
    if not weights or (path / "model.safetensors").exists():  # a model, whatever else its trainer left beside it
        return False
    return (path / "state.json").exists() or (path / "checkpoints").is_dir()


def read_weights(spec: str) -> dict[str, Tensor]:
    """The tensors that `start.weights` names, under the names that they have there. Raises StartError, CheckpointError."""
    if is_checkpoint(spec):
        return read_tensors(read_checkpoint(spec), "teacher.backbone.")
    return _from_files(weight_files(spec), spec)


def weight_files(spec: str) -> list[Path]:
    """The safetensors files of a `start.weights` that is no checkpoint of ours; the hub's are fetched. Raises StartError."""
    if spec.startswith("timm:"):
        return _from_hub(_timm_repository(spec.removeprefix("timm:")), spec)
    if spec.startswith("hf:"):
        return _from_hub(spec.removeprefix("hf:"), spec)
    path = Path(spec)
    files = [path / "model.safetensors"] if path.is_dir() else [path]
    if (path / "model.safetensors.index.json").exists():
        files = [path / name for name in _indexed(path / "model.safetensors.index.json")]
    for file in files:
        if file.suffix != ".safetensors":
            raise StartError(
                f"start.weights={spec}: {file.name} is not safetensors, and a pickle can run code, so nothing else is read; "
                "save the tensors with safetensors.torch.save_file"
            )
        if not file.is_file():
            raise StartError(f"start.weights={spec}: {file} cannot be read (there is no such file)")
    return files


def _timm_repository(name: str) -> str:
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        cfg = None
    if cfg is None or not cfg.hf_hub_id:
        near = get_close_matches(name, timm.list_pretrained(), 3)
        raise StartError(f"timm {timm.__version__} knows no weights {name!r}; near: {', '.join(near) or 'none'}")
    return f"{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}" if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id


def _from_hub(repository: str, spec: str) -> list[Path]:
    try:
        try:
            files = [hf_hub_download(repository, "model.safetensors")]
        except EntryNotFoundError:
            index = Path(hf_hub_download(repository, "model.safetensors.index.json"))
            files = [hf_hub_download(repository, name) for name in _indexed(index)]
    except OSError as error:  # no network, no such repository, no safetensors in it
        raise StartError(
            f"start.weights={spec}: {repository} could not be fetched ({str(error).partition(chr(10))[0]}); "
            "without a network give the path of a safetensors file or of its folder"
        ) from None
    return [Path(file) for file in files]


def _indexed(index: Path) -> list[str]:
    """The files that an index of shards names. Raises StartError for one that is none."""
    try:
        names = set(read_object(index)["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard lies in another folder")
        return sorted(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartError(f"{index} is no index of safetensors shards ({error!r})") from None


def _from_files(files: list[Path], spec: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            twice = read_header(file).keys() & found.keys()
            if twice:
                raise TensorFileError(f"it holds {min(twice)!r}, as another shard does")
            found |= load_file(file)
        except (OSError, SafetensorError, TensorFileError) as error:
            raise StartError(f"start.weights={spec}: {file} cannot be read ({error})") from None
    return found


# What a file may hold beside a backbone without anybody missing it: classifiers, poolers, constants.
_NO_WEIGHTS = ("head.*", "classifier.*", "pooler.*", "fc_norm.*", "*rope*periods", "*.bias_mask", "local_cls_norm.*")

# transformers' names inside a layer (ViT, Dinov2, Dinov2WithRegisters, DINOv3ViT; old files and new) -> ours; q, k, v still apart
_LAYER = (
    (r"attention\.(?:attention\.)?(?:query|q_proj)\.", "attn.q."),
    (r"attention\.(?:attention\.)?(?:key|k_proj)\.", "attn.k."),
    (r"attention\.(?:attention\.)?(?:value|v_proj)\.", "attn.v."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.", "mlp.fc2."),
    (r"(?:layernorm_before|norm1)\.", "norm1."),
    (r"(?:layernorm_after|norm2)\.", "norm2."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
)
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def timm_names(weights: Mapping[str, Tensor], ours: set[str]) -> dict[str, Tensor]:
    """Tensors of timm, transformers or the DINO repositories -> the names that a timm model with the keys `ours` gives them.

    What has no name in timm keeps its own.
    """
    found = dict(weights)
    for prefix in ("teacher.backbone.", "module.", "backbone."):  # training checkpoints of the DINO repositories
        if any(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
    if any(name.endswith("embeddings.cls_token") for name in found):
        found = _from_transformers(found)
    renamed = {_from_dino(name): x for name, x in found.items()}
    if "pos_embed" not in ours:  # rotary positions: timm keeps DINOv3 in another class, with names of its own
        renamed = _rotary_names(renamed, ours)
    return {name: x for name, x in renamed.items() if name in ours or not _matches(name, _NO_WEIGHTS)}


def _from_dino(name: str) -> str:
    """Names of facebookresearch/dinov2 and dinov3: blocks in chunks, SwiGLU, registers."""
    name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # a chunk numbers its blocks by their depth in the whole
    name = name.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
    return {"register_tokens": "reg_token", "storage_tokens": "reg_token"}.get(name, name)


def _from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        bare = re.sub(r"^(?:(?:vit|dinov2|dinov2_with_registers|dinov3_vit|model|encoder)\.)+", "", name)
        layer = re.match(r"layers?\.(\d+)\.(.+)", bare)
        if layer is None:
            found[_OUTSIDE.get(bare, bare)] = x
            continue
        inner = layer[2]
        for pattern, ours in _LAYER:
            inner, hits = re.subn(f"^{pattern}", ours, inner)
            if hits:
                break
        found[f"blocks.{layer[1]}.{inner}"] = x
    for name in [name for name in found if re.search(r"\.(?:attn\.q|mlp\.up_proj)\.", name)]:
        if ".attn.q." in name:
            key = found.pop(name.replace(".q.", ".k."), None)  # DINOv3's keys have no bias: that is a bias of zero
            query, value = found.pop(name), found.pop(name.replace(".q.", ".v."))
            found[name.replace(".q.", ".qkv.")] = torch.cat([query, torch.zeros_like(query) if key is None else key, value])
        elif name.replace(".up_proj.", ".gate_proj.") in found:
            gate = found.pop(name.replace(".up_proj.", ".gate_proj."))
            found[name.replace(".up_proj.", ".fc1.")] = torch.cat([gate, found.pop(name)])  # the gated half stands first
        else:
            found[name.replace(".up_proj.", ".fc1.")] = found.pop(name)
    if "reg_token" in found and not found["reg_token"].shape[1]:
        del found["reg_token"]
    return found


def _rotary_names(weights: Mapping[str, Tensor], ours: set[str]) -> dict[str, Tensor]:
    """timm's DINOv3 (class Eva): LayerScale, biases of q and v apart, SwiGLU in two matrices."""
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        name = re.sub(r"ls([12])\.gamma$", r"gamma_\1", name)
        if name.endswith("attn.qkv.bias"):
            query, key, value = x.chunk(3)
            if name.replace("qkv.bias", "q_bias") in ours:
                found |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
                if key.any():
                    found[name] = x  # a key bias, which this model has no place for: left over, and refused as such
            elif x.any():
                found[name] = x
        elif ".mlp.fc1." in name and name not in ours:
            gate, straight = x.chunk(2)
            found |= {name.replace("fc1.", "fc1_g."): gate, name.replace("fc1.", "fc1_x."): straight}
        else:
            found[name] = x
    return found


def resize_positions(table: Tensor, grid: tuple[int, int], convention: str) -> Tensor:
    """Patch positions [1, g*g, D] -> [1, h*w, D], bicubic in float32; at its own grid the table itself.

    timm: to the size, antialiased (also DINOv2 with registers). dinov2: by the factor (h + 0.1) / g, not antialiased (what
    facebookresearch/dinov2 without registers does). Raises StartError when the table is not square.
    """
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise StartError(f"a position table of {table.shape[1]} patches is not square")
    if grid == (side, side):
        return table
    image = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if convention == "timm":
        image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    else:
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        image = F.interpolate(image, scale_factor=factors, mode="bicubic")
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def _fit_positions(weights: dict[str, Tensor], vit: nn.Module, table: Tensor, own: Tensor, convention: str) -> list[str]:
    """Bring `pos_embed` to the model's rows and grid, and where the model has no row for the class token, into that token."""
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    ours = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)  # type: ignore[arg-type]
    candidates = ([0, 1, 1 + registers] if registers else [1, 0]) if own.shape[1] != table.shape[1] else [ours]
    rows = next((n for n in candidates if math.isqrt(table.shape[1] - n) ** 2 == table.shape[1] - n > 0), None)
    if rows is None:
        raise StartError(f"pos_embed holds {table.shape[1]} rows: neither a square grid nor one with a class token")
    prefix, patches = table[:, :rows], table[:, rows:]
    grid: tuple[int, int] = vit.patch_embed.grid_size  # type: ignore[union-attr,assignment]
    side = math.isqrt(patches.shape[1])
    resized = resize_positions(patches, grid, convention)
    if ours == 0 and rows:  # exact: a token and its constant position are one sum
        weights["cls_token"] = weights["cls_token"] + prefix[:, :1]
        if rows > 1:
            weights["reg_token"] = weights["reg_token"] + prefix[:, 1:]
        prefix = prefix[:, :0]
    elif ours > rows:
        prefix = torch.cat([prefix, prefix.new_zeros(1, ours - rows, table.shape[2])], 1)
    weights["pos_embed"] = torch.cat([prefix, resized], 1)
    said = f"positions resized from {side}x{side} to {grid[0]}x{grid[1]} ({convention}'s convention)"
    return [] if resized is patches else [said]


def _compare(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], config: StartConfig) -> list[str]:
    """Refuses what does not fit exactly and was not allowed by name; says what was left aside."""
    for field, patterns, names in (("may_lack", config.may_lack, own), ("may_ignore", config.may_ignore, weights)):
        idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if idle:
            near = get_close_matches(idle[0], names, 1)
            raise StartError(f"start.{field} names {idle[0]!r}, which nothing is called{f'; near: {near[0]}' if near else ''}")
    lacking = [name for name in own if name not in weights and not _matches(name, config.may_lack)]
    beyond = [name for name in weights if name not in own]
    left = [name for name in beyond if not _matches(name, config.may_ignore)]
    wrong = [
        f"{name} is {list(weights[name].shape)} there, {list(x.shape)} here"
        for name, x in own.items()
        if name in weights and weights[name].shape != x.shape
    ]
    if lacking or left or wrong:
        why = [
            f"it lacks {_few(lacking)}" if lacking else "",
            f"it holds {_few(left)}, which the model has no place for" if left else "",
            _few(wrong),
        ]
        hints = [hint for pattern, hint in _HINTS if any(re.search(pattern, name) for name in (*lacking, *left, *wrong))]
        raise StartError(
            f"{config.weights} does not fit the model: {'; '.join(filter(None, why))}. "
            f"{' '.join(hints)} Nothing is loaded in part unless start.may_lack or start.may_ignore names it"
        )
    aside = [f"left aside: {_few(beyond)}"] if beyond else []
    kinds = sorted({str(weights[name].dtype).removeprefix("torch.") for name in own if name in weights} - {"float32"})
    return aside + ([f"{', '.join(kinds)} weights became float32"] if kinds else [])


_HINTS = (
    (r"\bls[12]\.gamma", "LayerScale: model.layer_scale=null where the weights have none, 1e-5 where they do."),
    (r"reg_token", "Registers: model.registers must be the weights' own number, or start.may_lack=[reg_token]."),
    (r"patch_embed\.proj\.weight is", "model.patch_size, model.width and the weights must agree."),
    (r"mlp\.fc[12]\.weight is", "MLP or SwiGLU comes with model.architecture."),
)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
