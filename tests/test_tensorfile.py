"""A checkpoint's hash names its weights, however they were written; a header that lies is told before a tensor is read."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from histoscale.data.ranks import Ranks
from histoscale.data.storage import Store
from histoscale.eval.encoder import _weights as encoder_weights
from histoscale.eval.hub import EncoderError
from histoscale.pretrain.checkpoint import CheckpointError, read_checkpoint, read_tensors, write_checkpoint
from histoscale.pretrain.release import model_config
from histoscale.pretrain.start import StartConfig, StartError, load_start, read_weights
from histoscale.pretrain.tensorfile import TensorFileError, read_header, read_wholes, weights_digest

ALONE = Ranks(0, 1, 0, torch.device("cpu"), False)
Header = dict[str, Any]


def tensors() -> dict[str, torch.Tensor]:
    return {"teacher.w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}


def pieces(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: Header | bytes, payload: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)


def vouch(folder: Path) -> None:
    """state.json says the size and sha256 of the shards as they are now."""
    state = json.loads((folder / "state.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    state["shards"] = {file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
                       for file in files}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", 1, tensors(), {"identity": {"seed": 0}}, ALONE)


def reordered(folder: Path) -> None:
    """The same tensors behind one another in another order, under metadata in another order."""
    (path,) = folder.glob("*.safetensors")
    header, payload = pieces(path)
    about, place, data = header.pop("__metadata__"), 0, b""
    for name in sorted(header, reverse=True):
        start, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [place, place + stop - start]
        place, data = place + stop - start, data + payload[start:stop]
    put(path, {**header, "__metadata__": dict(reversed(about.items()))}, data)


def shared_out(folder: Path) -> None:
    """As two ranks write it: each the half of a tensor, along its first dimension."""
    (path,) = folder.glob("*.safetensors")
    whole = tensors()
    parts = [
        {"teacher.w": whole["teacher.w"][:1]},
        {"teacher.w": whole["teacher.w"][1:].contiguous(), "b": whole["b"], "n": whole["n"]},
    ]
    for i, (part, first) in enumerate(zip(parts, (0, 1), strict=True)):
        offsets = {name: {"saved_offsets": ([first] + [0] * (x.ndim - 1) if name == "teacher.w" else [0] * x.ndim)}
                   for name, x in part.items()}  # fmt: skip
        save_file(part, folder / f"shard-{i}.safetensors", {"DCP_SHARDING_INFO": json.dumps(offsets)})
    path.unlink()


@pytest.mark.parametrize("rewrite", [reordered, shared_out])
def test_equal_weights_have_one_hash(step: Path, tmp_path: Path, rewrite: Callable[[Path], None]) -> None:
    other = tmp_path / "other"
    shutil.copytree(step, other)
    rewrite(other)
    vouch(other)
    files = [sorted(path.read_bytes() for path in folder.glob("*.safetensors")) for folder in (step, other)]
    assert files[0] != files[1]
    first, second = read_checkpoint(step), read_checkpoint(other)
    assert (first.hash, first.identity) == (second.hash, second.identity) and len(first.hash) == 64
    assert torch.equal(read_tensors(second, "teacher.")["w"], tensors()["teacher.w"])


@pytest.mark.parametrize("change", [
    {"teacher.w": torch.arange(12.0).reshape(4, 3) + 1}, {"teacher.w": torch.arange(12.0).reshape(3, 4)},
    {"teacher.w": torch.arange(12.0).reshape(4, 3).int()}, {"n": torch.tensor([3])}, {"more": torch.zeros(0)},
])  # fmt: skip
def test_other_weights_have_another(step: Path, tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    facts = {"identity": {"seed": 0}}
    other = read_checkpoint(write_checkpoint(tmp_path / "other", 1, {**tensors(), **change}, facts, ALONE))
    assert other.hash != read_checkpoint(step).hash
    same = read_checkpoint(write_checkpoint(tmp_path / "facts", 1, tensors(), {"identity": {"seed": 1}}, ALONE))
    assert same.hash == read_checkpoint(step).hash and same.identity != read_checkpoint(step).identity


def edited(change: Callable[[Header], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        header, payload = pieces(path)
        change(header)
        put(path, header, payload)

    return apply


def no_length(path: Path) -> None:
    header, payload = pieces(path)
    put(path, header, payload, 1 << 62)


def twice(path: Path) -> None:
    header, payload = pieces(path)
    text = json.dumps(header).replace('"b":', '"n":').encode()
    put(path, text, payload)


def raw(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)


def far_away(header: Header) -> dict[str, str]:
    """Sharding information by which every tensor is a part of a larger one, whose rest nobody holds."""
    places = {name: {"saved_offsets": [9] * len(one["shape"])} for name, one in header.items() if name != "__metadata__"}
    return {"DCP_SHARDING_INFO": json.dumps(places)}


HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (raw(b""), "announces a header of 0 bytes in a file of 0"),
    (raw(b"\x10\0\0"), "announces a header of"),
    (no_length, "announces a header of 4611686018427387904 bytes"),
    (raw((4).to_bytes(8, "little") + b"[[[["), "damaged header"),
    (raw((90_000).to_bytes(8, "little") + b"[" * 90_000), "nested too deep"),
    (twice, "names something twice"),
    (edited(lambda header: header["n"].update(data_offsets=[0, 1 << 40])), "does not describe 'n' rightly"),
    (edited(lambda header: header["n"].update(data_offsets=[-8, 0])), "does not describe 'n' rightly"),
    (edited(lambda header: header["n"].update(data_offsets=[1, 9])), "keeps '[a-z.]+' from byte"),
    (edited(lambda header: header["n"].update(shape=[1 << 40])), "does not describe 'n' rightly"),
    (edited(lambda header: header["n"].update(shape=["9" * 9, 10**9])), "does not describe 'n' rightly"),
    (edited(lambda header: header["n"].update(shape=[True])), "does not describe 'n' rightly"),
    (edited(lambda header: header["n"].update(shape=float("nan"))), "does not describe 'n' rightly"),
    (edited(lambda header: header["n"].update(dtype="F4")), "does not describe 'n' rightly"),
    (edited(lambda header: header["n"].pop("dtype")), "does not describe 'n' rightly"),
    (edited(lambda header: header.update(n=5)), "does not describe 'n' rightly"),
    (edited(lambda header: header.pop("n")), "keeps|its header describes"),
    (edited(lambda header: header.update(__metadata__={"DCP_SHARDING_INFO": "{"})), "damaged header"),
    (edited(lambda header: header.update(__metadata__={"DCP_SHARDING_INFO": 5})), "damaged header"),
    (edited(lambda header: header.update(__metadata__={"DCP_SHARDING_INFO": "{}"})), "rightly"),
    (edited(lambda header: header.update(__metadata__=far_away(header))), "no part that fits"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "words"), HOSTILE)
def test_a_header_that_lies_is_named(step: Path, tmp_path: Path, store: Store, harm: Callable[[Path], None], words: str) -> None:
    (path,) = step.glob("*.safetensors")
    harm(path)
    vouch(step)
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(step)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TensorFileError):
        read_wholes([path])
    if "no part" not in words:
        with pytest.raises(StartError, match=words):
            read_weights(str(path))
        shutil.copy(path, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(EncoderError, match=words):
            encoder_weights(str(tmp_path), store)


def test_the_digest_is_of_what_the_header_says(tmp_path: Path) -> None:
    """Against the rule written down again: for names in their order, a line of JSON and the bytes."""
    save_file(tensors(), tmp_path / "a.safetensors", {"x": "1", "y": "2"})
    digest = hashlib.sha256()
    for name, dtype, shape, data in (("b", "BF16", [2], tensors()["b"].view(torch.int16)), ("n", "I64", [], tensors()["n"]),
                                     ("teacher.w", "F32", [4, 3], tensors()["teacher.w"])):  # fmt: skip
        digest.update(json.dumps([name, dtype, shape]).encode() + b"\n" + data.numpy().tobytes())
    assert weights_digest(read_wholes([tmp_path / "a.safetensors"])) == digest.hexdigest()
    assert read_header(tmp_path / "a.safetensors")["n"].shape == ()


@pytest.mark.parametrize("facts", [{}, {"identity": 5}, {"identity": {"model": None}}, {"identity": {"model": {"width": "x"}}}])
def test_a_checkpoint_that_describes_no_model_is_named(tmp_path: Path, facts: dict[str, Any]) -> None:
    state = read_checkpoint(write_checkpoint(tmp_path, 1, tensors(), facts, ALONE))
    with pytest.raises(CheckpointError, match="state.json does not describe its run") as error:
        model_config(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shard", [5, [], {"size": 1}, None])
def test_a_state_that_vouches_for_nothing_is_named(step: Path, shard: object) -> None:
    state = json.loads((step / "state.json").read_text())
    state["shards"] = dict.fromkeys(state["shards"], shard)
    (step / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="state.json says no size and sha256 of"):
        read_checkpoint(step)


@pytest.mark.parametrize("change", [
    {"blocks.0.attn.qkv.weight": None, "encoder.layer.0.attention.attention.query.weight": torch.zeros(8, 8),
     "embeddings.cls_token": torch.zeros(1, 1, 8)},
    {"pos_embed": torch.zeros(5)}, {"pos_embed": torch.zeros(1, 0, 8)}, {"cls_token": None, "pos_embed": torch.zeros(1, 17, 8)},
])  # fmt: skip
def test_tensors_that_make_up_no_backbone_are_named(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> None:
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    whole = {**vit.state_dict(), **change}
    path = tmp_path / "model.safetensors"
    save_file({name: x.contiguous() for name, x in whole.items() if x is not None}, path)
    with pytest.raises(StartError) as error:
        load_start(vit, StartConfig(str(path), "both", False, False, "timm", [], [], 0))
    assert str(path) in str(error.value) or "pos_embed" in str(error.value)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({"x": torch.full((2,), float(i))}, tmp_path / f"{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}')
    with pytest.raises(StartError, match="2.safetensors cannot be read .it holds 'x', as another shard does"):
        read_weights(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../1.safetensors"}}')
    with pytest.raises(StartError, match="is no index of safetensors shards"):
        read_weights(str(tmp_path))
