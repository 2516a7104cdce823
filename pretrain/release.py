"""A checkpoint's backbone as a directory that others open without a word of code: weights, config, preprocessing, card.

`timm.create_model("local-dir:DIR", pretrained=True)`, `transformers.AutoModel.from_pretrained("DIR")` (its wrapper of timm's
models) and `torch.hub.load(CHECKOUT, "histoscale", "DIR", source="local")`. Nothing is pickled, no path of this machine is told.
"""

import hashlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import histoscale
from histoscale.data.journal import plain, write_json, write_text
from histoscale.pretrain.backbone import ModelConfig, build_backbone, timm_arguments
from histoscale.pretrain.checkpoint import CheckpointError, CheckpointState, read_tensors

BRANCHES = ("teacher", "student")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "MODEL.json", "README.md")
NEAR_MPP = 0.5  # 20x, where most slides have a level
_PLACE = re.compile(r"(?P<origin>([a-z-]+:)*)(/|~|[a-z0-9+.-]+://)(.*/)?(?P<name>[^/]+)/?")  # on a machine or in a store


@dataclass(frozen=True)
class ReleaseConfig:
    """name: of the model. branch: teacher or student. license: an SPDX id or `other`.

    embedding: what to use downstream, cls or cls+mean (of the patch tokens); advice, it changes no weight.
    """

    name: str
    branch: str
    license: str
    embedding: str


def read_backbone(state: CheckpointState, branch: str) -> VisionTransformer:
    """The teacher's or student's backbone of a checkpoint: float32, CPU, eval mode.

    Raises ValueError for another branch, CheckpointError when weights and configuration do not fit exactly.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch is {branch!r}: expected {' or '.join(BRANCHES)}")
    vit = build_backbone(model_config(state), seed=0)
    tensors = read_tensors(state, f"{branch}.backbone.")
    try:
        vit.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{state.path}: the weights do not fit the model that state.json describes ({error})") from None
    return vit.eval()


def model_config(state: CheckpointState) -> ModelConfig:
    """The model that a checkpoint's state.json describes. Raises CheckpointError for one that describes none."""
    with described(state):
        return TypeAdapter(ModelConfig).validate_python(state.facts["identity"]["model"])


@contextmanager
def described(state: CheckpointState) -> Iterator[None]:
    """What is missing or of another kind among the facts of a checkpoint becomes a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{state.path / 'state.json'} does not describe its run ({why}): it is damaged") from None


def network_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """timm's arguments without the number of classes: transformers gives that one itself, and twice is an error."""
    return {name: value for name, value in arguments.items() if name != "num_classes"}


def default_mpp(mpps: Sequence[float], magnification: str) -> float | None:
    """um/px at which an encoder looks unless asked otherwise: of those that it was trained at the one nearest 0.5, the finer of
    two; with magnification=log_uniform 0.5 itself where it lies in the range. None where nothing is known."""
    if not mpps:
        return None
    if magnification == "log_uniform":
        return min(max(NEAR_MPP, min(mpps)), max(mpps))
    return min(mpps, key=lambda mpp: (abs(mpp - NEAR_MPP), mpp))


def write_release(
    state: CheckpointState, out: Path, precision: str, config: ReleaseConfig, measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Write the release of a checkpoint into `out`; returns what MODEL.json says.

    precision: of the file, fp32 or bf16. measured: scores (a summary.json) for the card, None where nothing was measured. The
    directory is opened with timm before this returns. Raises ValueError for an unknown precision or embedding, and when timm does
    not give back the same features.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected {' or '.join(PRECISIONS)}, as weights are kept in a file")
    if config.embedding not in ("cls", "cls+mean"):
        raise ValueError(f"release.embedding is {config.embedding!r}: expected cls or cls+mean")
    vit, model = read_backbone(state, config.branch), model_config(state)
    vit.to(PRECISIONS[precision])
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: x.contiguous() for name, x in vit.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    with described(state):
        facts = _facts(state, model, vit, precision, config, out / "model.safetensors")
        text = card(facts, measured)
    write_json(out / "config.json", _timm_config(model, vit, config, facts))
    write_json(out / "preprocessor_config.json", _preprocessor(model, facts))
    write_json(out / "MODEL.json", facts)
    write_text(out / "README.md", text)
    _check_opens(out, vit, model)
    return facts


def _facts(
    state: CheckpointState, model: ModelConfig, vit: VisionTransformer, precision: str, config: ReleaseConfig, weights: Path
) -> dict[str, Any]:
    """What timm's config has no field for: magnifications, tokens, data, recipe, provenance."""
    identity = state.facts["identity"]
    sampler = identity["facts"].get("sampler", {})
    grid = model.img_size // model.patch_size
    return {
        "name": config.name,
        "license": config.license,
        "architecture": model.architecture,
        "width": vit.embed_dim,
        "parameters": sum(p.numel() for p in vit.parameters()),
        "patch_size": model.patch_size,
        "img_size": model.img_size,
        "tokens": {"class": 1, "registers": model.registers, "patches": [grid, grid]},
        "embedding": config.embedding,
        "mean": identity["views"]["mean"],
        "std": identity["views"]["std"],
        "mpp": {
            "default": default_mpp(sampler.get("mpps") or (), sampler.get("magnification", "discrete")),
            "trained_at": sampler.get("mpps"),
            "weights": sampler.get("weights"),
            "magnification": sampler.get("magnification"),
        },
        "tile_px": sampler.get("patch_px"),
        "branch": config.branch,
        "steps": state.step,
        "patches_seen": state.step * identity["optim"]["global_batch"],
        "data": identity["facts"].get("data"),
        "transductive": identity["facts"].get("transductive", False),
        "precision": precision,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "checkpoint_sha256": state.hash,
        "made_with": {
            "histoscale": histoscale.__version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "recipe": _without_places(plain(identity)),
    }


def _timm_config(model: ModelConfig, vit: VisionTransformer, config: ReleaseConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """timm's hub form. License and tag are set here, because timm would fill in those of the architecture's own weights."""
    return {
        "architecture": model.architecture,
        "num_classes": 0,
        "num_features": vit.num_features,
        "global_pool": "token",
        "dtype": "float32",  # transformers' alone: as timm does, whatever the file holds
        "model_args": network_arguments(timm_arguments(model)),
        "pretrained_cfg": {
            "tag": config.name,
            "license": config.license,
            "custom_load": False,
            "input_size": [3, model.img_size, model.img_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": facts["mean"],
            "std": facts["std"],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _preprocessor(model: ModelConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same preprocessing in the form that transformers reads."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": model.img_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": model.img_size, "width": model.img_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": facts["mean"],
        "image_std": facts["std"],
    }


def card(facts: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    """The model card in Markdown: data, recipe, compute and measured scores, each or the words that it is unknown."""
    mpps, width, prefix = facts["mpp"]["trained_at"], facts["width"], 1 + facts["tokens"]["registers"]
    tile = facts["tile_px"] or facts["img_size"]
    look = f"{facts['mpp']['default']:g} um/px" if mpps else "the scale that it was trained at"
    embedding = "cls" if facts["embedding"] == "cls" else "torch.cat([cls, mean], dim=1)"
    optim, schedule = facts["recipe"]["optim"], facts["recipe"]["schedule"]
    data = facts["data"] or {}
    counts = "\n".join(f"- {name}: {value}" for name, value in data.items()) or "Not recorded."
    scores = "\n".join(f"| {name} | {value} |".replace("\n", " ") for name, value in _scores(measured or {}))
    warning = "\n**Transductive**: patients of test roles were seen in pretraining.\n" if facts["transductive"] else ""
    return f"""---
license: {facts["license"]}
library_name: timm
pipeline_tag: image-feature-extraction
tags: [histology, pathology, vision, pytorch, self-supervised, vit, dino]
---
# {facts["name"]}

A vision transformer for patches of histology slides ({facts["architecture"]}, width {facts["width"]},
{facts["parameters"] / 1e6:.1f}M parameters), trained without labels. For research; not a diagnostic device. Do not use it to
re-identify patients.

With this folder as the working directory, in timm:

```python
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
patch = Image.new("RGB", ({tile}, {tile}), "white")  # your patch of tissue, {look}
with torch.inference_mode():
    tokens = model.forward_features(transform(patch)[None])  # [1, {prefix} + patches, {width}]
cls, mean = tokens[:, 0], tokens[:, {prefix}:].mean(dim=1)
embedding = {embedding}
```

in transformers:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model, processor = AutoModel.from_pretrained(".").eval(), AutoImageProcessor.from_pretrained(".")
patch = Image.new("RGB", ({tile}, {tile}), "white")  # your patch of tissue, {look}
with torch.inference_mode():
    tokens = model(**processor(patch, return_tensors="pt")).last_hidden_state  # [1, {prefix} + patches, {width}]
```

or, with the code of histoscale, `torch.hub.load(CHECKOUT, "histoscale", FOLDER, source="local")` and
`histoscale embed encoder=FOLDER catalog=CATALOG`.

Recommended embedding: `{facts["embedding"]}`. Trained on patches of {tile} px at {_listed(mpps)} um/px; give it patches at
{look} unless you know better.

## Data
{counts}
{warning}
## Recipe
{facts["branch"].capitalize()} after {facts["steps"]} of {schedule["steps"]} steps of {optim["global_batch"]} patches
({facts["patches_seen"]} patches seen, {facts["recipe"]["precision"]}). `MODEL.json` holds the whole configuration and the hashes.

## Measured
{f"| score | value |{chr(10)}|---|---|{chr(10)}{scores}" if scores else "Not measured."}
"""


def _scores(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A summary's nested numbers as rows; a {value, low, high} is one row with its 95 % interval."""
    if {"value", "low", "high"} <= values.keys():
        value, low, high = (values[name] if isinstance(values[name], int | float) else None for name in ("value", "low", "high"))
        interval = "interval withheld" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"
        return [(prefix, "not measured" if value is None else f"{value:.3f} {interval}")]
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        named = str(name).replace("|", "\\|")  # an encoder's name may hold what ends a cell
        full = f"{prefix}.{named}" if prefix else named
        if isinstance(value, Mapping):
            rows += _scores(value, full)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            rows.append((full, f"{value:.4g}"))
    return rows


def _without_places(value: Any) -> Any:
    """Plain values whose paths and URIs are left with their last part: where files lay says nothing to others."""
    if isinstance(value, Mapping):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    found = _PLACE.fullmatch(value) if isinstance(value, str) else None
    return value if found is None else found["origin"] + found["name"]


def _listed(mpps: list[float] | None) -> str:
    return "unknown" if not mpps else ", ".join(f"{mpp:g}" for mpp in mpps)


def _check_opens(out: Path, vit: VisionTransformer, model: ModelConfig) -> None:
    """timm must give the same features from the directory, to the bit."""
    again = cast(VisionTransformer, timm.create_model(f"local-dir:{out}", pretrained=True))
    dtype = next(vit.parameters()).dtype
    again.eval().to(dtype)
    x = torch.linspace(-1, 1, 3 * model.img_size**2, dtype=dtype).view(1, 3, model.img_size, model.img_size)
    with torch.inference_mode():
        same = torch.equal(again.forward_features(x), vit.forward_features(x))
    if not same:
        raise ValueError(f"{out}: timm {timm.__version__} does not give back the checkpoint's features")
