"""Published attention pooling and Nystrom attention with our weights: torchmil (Apache-2.0), nystrom-attention (MIT).

    pip install --no-deps --target ORACLE torchmil==1.0.2 nystrom-attention==0.0.14 einops==0.8.2 tensordict==0.15.3 \\
        pyvers==0.2.3 cloudpickle==3.1.3
    PYTHONPATH=ORACLE pytest tests/test_oracle_mil.py

The authors' own code (AttentionDeepMIL, CLAM, TransMIL) runs beside ours in tests/oracle_mil.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from histoscale.eval.mil.aggregators.abmil import Abmil, AbmilConfig
from histoscale.eval.mil.aggregators.pooled import Tiles
from histoscale.eval.mil.aggregators.transmil import NystromAttention, TransmilConfig, pseudo_inverse
from histoscale.eval.mil.fit import pad

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("gated", [True, False])
def test_attention_pooling_is_torchmils(gated: bool) -> None:
    """Logits and attention of padded bags, in float32."""
    models: Any = pytest.importorskip("torchmil.models", reason="torchmil is not installed: see the first lines of this file")
    torch.manual_seed(0)
    theirs = models.ABMIL(in_shape=(24,), att_dim=16, gated=gated).eval()
    ours = Abmil(24, 1, AbmilConfig("abmil", [], "none", 16, gated, [], 0.0, 0.0, "torch")).eval()
    weights = {name.replace(".module", ""): value for name, value in theirs.state_dict().items()}
    names = {"pool.fc1": "attend.content", "pool.fc_gated": "attend.gate", "pool.fc2": "attend.weigh", "classifier": "classify.0"}
    copied = {
        f"{ours_}.{end}": weights[f"{name}.{end}"]
        for name, ours_ in names.items()
        for end in ("weight", "bias")
        if f"{name}.{end}" in weights
    }
    left = ours.load_state_dict(copied, strict=False)
    assert left.missing_keys == ["attend.weigh.bias"] and not left.unexpected_keys  # theirs has none; a softmax does not see it
    x, mask = pad([torch.randn(n, 24) for n in (1, 7, 40)])
    logits, raw = theirs(x, mask.float(), return_att=True)
    found = ours(x, mask)
    torch.testing.assert_close(found.logits[:, 0], logits, **CLOSE)
    torch.testing.assert_close(found.attention, raw.masked_fill(~mask, float("-inf")).softmax(1), **CLOSE)
    for i, n in enumerate((1, 7, 40)):
        whole = ours.whole(Tiles(x[i, :n].numpy(), torch.zeros(24), torch.ones(24), 16))
        torch.testing.assert_close(whole.logits.float(), logits[i : i + 1].detach(), **CLOSE)


def copied(theirs: Any, config: TransmilConfig) -> NystromAttention:
    ours = NystromAttention(config)
    weights = theirs.state_dict()
    ours.load_state_dict(
        {
            "to_qkv.weight": weights["to_qkv.weight"],
            "convolve.weight": weights["res_conv.weight"][..., 0],
            "to_out.weight": weights["to_out.0.weight"],
            "to_out.bias": weights["to_out.0.bias"],
        }
    )
    return ours.eval()


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 50])
def test_nystrom_attention_is_the_published_one(tokens: int) -> None:
    """Fewer tokens than landmarks, as many, and more; output, gradient, and the weights of the first token."""
    published: Any = pytest.importorskip("nystrom_attention", reason="nystrom-attention is not installed: see the first lines")
    torch.manual_seed(tokens)
    config = TransmilConfig("transmil", hidden=24, heads=3, landmarks=16, iterations=6, kernel=5, dropout=0.1)
    theirs = published.NystromAttention(24, 8, 3, 16, 6, True, 5, dropout=0.1).eval()
    ours = copied(theirs, config)
    x = torch.randn(tokens, 24)

    def run(model: Any) -> tuple[Tensor, Tensor, Tensor]:
        own = x.clone().requires_grad_()
        if model is ours:
            out, first = ours(own)
        else:
            out, (one, inverse, three) = model(own[None], return_attn_matrices=True)
            before = one.shape[2] - tokens
            out, first = out[0], (one @ inverse @ three)[0, :, before, before:]
        out.square().sum().backward()
        assert own.grad is not None
        return out, first, own.grad

    for mine, other in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_pseudo_inverse_is_the_published_one() -> None:
    module: Any = pytest.importorskip("nystrom_attention.nystrom_attention", reason="nystrom-attention is not installed")
    torch.manual_seed(0)
    x = torch.randn(4, 12, 12).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(x, 6), module.moore_penrose_iter_pinv(x[None], 6)[0], **CLOSE)
