"""A checkpoint's backbone as a directory that timm opens without a word of code: weights, config, preprocessing, card.

`timm.create_model("local-dir:DIR", pretrained=True)`. Nothing is pickled. transformers' own names are not written yet.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import histoscale
from histoscale.data.journal import plain, write_atomic
from histoscale.pretrain.backbone import ModelConfig, build_backbone, timm_arguments
from histoscale.pretrain.checkpoint import CheckpointError, CheckpointState, read_tensors

BRANCHES = ("teacher", "student")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ReleaseConfig:
    """name: of the model. branch: teacher or student. precision: of the file, fp32 or bf16. license: an SPDX id or `other`.

    embedding: what to use downstream, cls or cls+mean (of the patch tokens); advice, it changes no weight.
    """

    name: str
    branch: str
    precision: str
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
    """The model that a checkpoint's state.json describes."""
    return TypeAdapter(ModelConfig).validate_python(state.facts["identity"]["model"])


def write_release(state: CheckpointState, out: Path, config: ReleaseConfig, measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write the release of a checkpoint into `out`; returns what MODEL.json says.

    measured: scores (a summary.json) for the card, None where nothing was measured. The directory is opened with timm before
    this returns. Raises ValueError for an unknown precision or embedding, and when timm does not give back the same features.
    """
    if config.precision not in PRECISIONS:
        raise ValueError(f"release.precision is {config.precision!r}: expected {' or '.join(PRECISIONS)}")
    if config.embedding not in ("cls", "cls+mean"):
        raise ValueError(f"release.embedding is {config.embedding!r}: expected cls or cls+mean")
    vit, model = read_backbone(state, config.branch), model_config(state)
    vit.to(PRECISIONS[config.precision])
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: x.contiguous() for name, x in vit.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    facts = _facts(state, model, vit, config, out / "model.safetensors")
    write_atomic(out / "config.json", _json(_timm_config(model, vit, config, facts)))
    write_atomic(out / "preprocessor_config.json", _json(_preprocessor(model, facts)))
    write_atomic(out / "MODEL.json", _json(facts))
    write_atomic(out / "README.md", card(facts, measured))
    _check_opens(out, vit, model)
    return facts


def _facts(
    state: CheckpointState, model: ModelConfig, vit: VisionTransformer, config: ReleaseConfig, weights: Path
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
        "mpp": {"trained_at": sampler.get("mpps"), "weights": sampler.get("weights")},
        "tile_px": sampler.get("patch_px"),
        "branch": config.branch,
        "steps": state.step,
        "patches_seen": state.step * identity["optim"]["global_batch"],
        "data": identity["facts"].get("data"),
        "transductive": identity["facts"].get("transductive", False),
        "precision": config.precision,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "checkpoint_sha256": state.hash,
        "made_with": {
            "histoscale": histoscale.__version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "recipe": identity,
    }


def _timm_config(model: ModelConfig, vit: VisionTransformer, config: ReleaseConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """timm's hub form. License and tag are set here, because timm would fill in those of the architecture's own weights."""
    return {
        "architecture": model.architecture,
        "num_classes": 0,
        "num_features": vit.num_features,
        "global_pool": "token",
        "model_args": timm_arguments(model),
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
    mpps = facts["mpp"]["trained_at"]
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

```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)   # {facts["img_size"]} px, mean and std of this model
tokens = model.forward_features(images)               # [B, 1 + {facts["tokens"]["registers"]} + patches, {facts["width"]}]
```

Recommended embedding: `{facts["embedding"]}`. Give it patches at {_listed(mpps)} um/px, the scales that it was trained at.

## Data
{counts}
{warning}
## Recipe
{facts["branch"].capitalize()} after {facts["steps"]} of {schedule["steps"]} steps of {optim["global_batch"]} patches
({facts["patches_seen"]} patches seen, {optim["precision"]}). `MODEL.json` holds the whole configuration and the hashes.

## Measured
{f"| score | value |{chr(10)}|---|---|{chr(10)}{scores}" if scores else "Not measured."}
"""


def _scores(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A summary's nested numbers as rows; a {value, low, high} is one row with its 95 % interval."""
    if {"value", "low", "high"} <= values.keys():
        value, low, high = (values[name] for name in ("value", "low", "high"))
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


def _listed(mpps: list[float] | None) -> str:
    return "unknown" if not mpps else ", ".join(f"{mpp:g}" for mpp in mpps)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(plain(values), indent=2) + "\n"


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
