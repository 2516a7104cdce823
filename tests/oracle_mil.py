"""The authors' own code beside ours, with copied weights on the same bags: gated ABMIL, GMA, CLAM-SB with its loss, TransMIL.

    git clone https://github.com/AMLab-Amsterdam/AttentionDeepMIL; git clone https://github.com/mahmoodlab/CLAM
    git clone https://github.com/szc19990412/TransMIL; git clone https://github.com/fuchs-lab-public/OPAL
    pip install --target OTHER --no-deps nystrom-attention einops
    CLONES=. PYTHONPATH=.ns:OTHER python tests/oracle_mil.py

CLONES is the folder that holds them; what is absent is left out and said. CLAM is GPL-3, TransMIL and OPAL have no licence: they
only run here, and nothing of them is in this repository. Prints the largest differences as JSON; exits 1 when one is over 1e-5
(of TransMIL 1e-4).
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from histoscale.eval.mil.aggregators.abmil import Abmil, AbmilConfig
from histoscale.eval.mil.aggregators.clam import Clam, ClamConfig
from histoscale.eval.mil.aggregators.transmil import Transmil, TransmilConfig

CLONES = Path(os.environ["CLONES"])
LIMITS = {"ilse_gated": 1e-5, "ilse_plain": 1e-5, "gma": 1e-5, "clam": 1e-5, "transmil": 1e-4}


def module(path: str) -> Any:
    """One file of a clone as a module, or None."""
    file = CLONES / path
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location(file.stem + "_published", file)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs.detach()).abs().max())


def alone(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[None], torch.ones(1, len(x), dtype=torch.bool)


def ilse(gated: bool) -> dict[str, float] | None:
    """Behind their convolutions, whose 500 features a bag are what our model takes."""
    published = module("AttentionDeepMIL/model.py")
    if published is None:
        return None
    theirs = (published.GatedAttention() if gated else published.Attention()).eval()
    config = AbmilConfig("abmil", [], "none", 128, gated, [], 0.0, 0.0, "torch")
    ours, weights = Abmil(500, 1, config).eval(), theirs.state_dict()
    names = {"attend.content": "attention_V.0", "attend.gate": "attention_U.0", "attend.weigh": "attention_w"}
    if not gated:
        names = {"attend.content": "attention.0", "attend.weigh": "attention.2"}
    names["classify.0"] = "classifier.0"
    ours.load_state_dict({f"{own}.{end}": weights[f"{name}.{end}"] for own, name in names.items() for end in ("weight", "bias")})
    off = {"probability": 0.0, "attention": 0.0}
    for n in (1, 9, 60):
        pictures = torch.randn(n, 1, 28, 28)
        probability, _, attention = theirs(pictures[None])
        h = theirs.feature_extractor_part2(theirs.feature_extractor_part1(pictures).view(-1, 800))
        found = ours(*alone(h))
        off["probability"] = max(off["probability"], far(found.logits.sigmoid(), probability))
        off["attention"] = max(off["attention"], far(found.attention, attention))
    return off


def gma() -> dict[str, float] | None:
    published = module("OPAL/SSL_benchmarks/code/gma_training/modules.py")
    if published is None:
        return None
    theirs = published.GMA(ndim=96, dropout=True, n_classes=2).eval()
    ours = Abmil(96, 2, AbmilConfig("abmil", [512, 512], "relu", 384, True, [], 0.25, 0.25, "xavier")).eval()
    weights, names = theirs.state_dict(), {"embed.0": "attention_net.0", "embed.3": "attention_net.3", "classify.0": "classifier"}
    names |= {"attend.content": "attention_net.6.attention_a.0", "attend.gate": "attention_net.6.attention_b.0"}
    names["attend.weigh"] = "attention_net.6.attention_c"
    ours.load_state_dict({f"{own}.{end}": weights[f"{name}.{end}"] for own, name in names.items() for end in ("weight", "bias")})
    off = {"logits": 0.0, "attention": 0.0}
    for n in (1, 9, 300):
        x = torch.randn(n, 96)
        raw, _, logits = theirs(x)
        found = ours(*alone(x))
        off["logits"] = max(off["logits"], far(found.logits, logits))
        off["attention"] = max(off["attention"], far(found.attention[0], torch.from_numpy(raw).softmax(0)))
    return off


def clam() -> dict[str, float] | None:
    """Logits, attention and the tiles' loss, both kinds of classes, bags of 16 tiles (twice 8) and more; and its gradient."""
    published = module("CLAM/models/model_clam.py")
    if published is None:
        return None
    off = {"logits": 0.0, "attention": 0.0, "instance_loss": 0.0, "gradient": 0.0}
    for subtyping in (False, True):
        theirs = published.CLAM_SB(n_classes=3, subtyping=subtyping, embed_dim=96, dropout=0.25).eval()
        ours = Clam(96, 3, ClamConfig("clam", 512, 256, 0.25, 0.25, 8, subtyping, 0.3)).eval()
        weights = theirs.state_dict()
        names = {"embed.0": "attention_net.0", "attend.content": "attention_net.3.attention_a.0"}
        names |= {"attend.gate": "attention_net.3.attention_b.0", "attend.weigh": "attention_net.3.attention_c"}
        names |= {"classify.0": "classifiers", **{f"instances.{i}": f"instance_classifiers.{i}" for i in range(3)}}
        ours.load_state_dict(
            {f"{own}.{end}": weights[f"{name}.{end}"] for own, name in names.items() for end in ("weight", "bias")}
        )
        for n in (16, 40, 300):
            x, label = torch.randn(n, 96), n % 3
            logits, _, _, raw, more = theirs(x, torch.tensor([label]), instance_eval=True)
            found = ours(*alone(x))
            off["logits"] = max(off["logits"], far(found.logits, logits))
            off["attention"] = max(off["attention"], far(found.attention, raw.softmax(1)))
            target = torch.tensor([label])
            mixed = ours.mix(F.cross_entropy(found.logits, target), found, alone(x)[1], target)
            expected = 0.7 * F.cross_entropy(logits, target) + 0.3 * more["instance_loss"]
            off["instance_loss"] = max(off["instance_loss"], far(mixed, expected))
            for model, loss in ((ours, mixed), (theirs, expected)):
                model.zero_grad()
                loss.backward()
            one, two = ours.embed[0].weight.grad, theirs.attention_net[0].weight.grad
            assert one is not None
            off["gradient"] = max(off["gradient"], far(one, two))
    return off


def transmil() -> dict[str, float] | None:
    published = module("TransMIL/models/TransMIL.py")
    if published is None:
        return None
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assign,misc]  # theirs moves its token to a GPU
    theirs = published.TransMIL(n_classes=2).eval()
    ours = Transmil(1024, 2, TransmilConfig("transmil", 512, 8, 256, 6, 33, 0.1)).eval()
    weights, own = theirs.state_dict(), {}
    for end in ("weight", "bias"):
        own |= {f"embed.0.{end}": weights[f"_fc1.0.{end}"], f"classify.{end}": weights[f"_fc2.{end}"]}
        own |= {f"norms.2.{end}": weights[f"norm.{end}"]}
        own |= {f"places.{i}.{end}": weights[f"pos_layer.{name}.{end}"] for i, name in enumerate(("proj", "proj1", "proj2"))}
        for i in (0, 1):
            own |= {f"norms.{i}.{end}": weights[f"layer{i + 1}.norm.{end}"]}
            own |= {f"layers.{i}.to_out.{end}": weights[f"layer{i + 1}.attn.to_out.0.{end}"]}
    for i in (0, 1):
        own |= {f"layers.{i}.to_qkv.weight": weights[f"layer{i + 1}.attn.to_qkv.weight"]}
        own |= {f"layers.{i}.convolve.weight": weights[f"layer{i + 1}.attn.res_conv.weight"][..., 0]}
    ours.load_state_dict({**own, "token": weights["cls_token"][0]})
    off = {"logits": 0.0, "gradient": 0.0}
    for n in (1, 2, 50, 255, 700):
        x = torch.randn(n, 1024)
        logits = theirs(data=x[None])["logits"]
        found = ours(*alone(x)).logits
        off["logits"] = max(off["logits"], far(found, logits))
        for model, loss in ((ours, found[0, 0]), (theirs, logits[0, 0])):
            model.zero_grad()
            loss.backward()
        one, two = ours.embed[0].weight.grad, theirs._fc1[0].weight.grad
        assert one is not None
        off["gradient"] = max(off["gradient"], far(one, two) / float(two.abs().max()))
    return off


def main() -> int:
    torch.manual_seed(0)
    found = {"ilse_gated": ilse(True), "ilse_plain": ilse(False), "gma": gma(), "clam": clam(), "transmil": transmil()}
    print(json.dumps({name: off if off is not None else "no clone" for name, off in found.items()}, indent=2))
    return int(any(off is not None and max(off.values()) > LIMITS[name] for name, off in found.items()))


if __name__ == "__main__":
    sys.exit(main())
