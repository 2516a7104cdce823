"""One full step: every loss term and every gradient of tiny models against the formulas restated in restated.py."""

from dataclasses import dataclass, replace

import pytest
import restated
import torch
import train_tiny
from torch import Tensor

from histoscale.data.keys import fork, keys
from histoscale.pretrain.backbone import ModelConfig, kept_rows
from histoscale.pretrain.masking import Masks
from histoscale.pretrain.methods import (
    Centres,
    DinoConfig,
    Dinov2Config,
    GramConfig,
    MethodConfig,
    Scheduled,
    build,
    build_gram_teacher,
    losses,
    masks_at,
)

VIEWS, LOCALS, B, TEMP, GLOBAL_PX, LOCAL_PX = 2, 3, 8, 0.05, 32, 16
HEAD = replace(train_tiny.HEAD, prototypes=24, scale="trainable")
TINY: ModelConfig = replace(train_tiny.CONFIG.model, width=24, heads=2, drop_path=0.3, mlp_ratio=2.0)
SWIGLU = replace(TINY, architecture="vit_giant_patch14_reg4_dinov2", registers=2, layer_scale=0.2)
GRAM = GramConfig(
    weight=0.7, warmup_steps=0, first_step=0, source="teacher", refresh_every=None, refreshes=0, px=None, tokens="all",
    scope="image", negatives="keep",
)  # fmt: skip
assert isinstance(train_tiny.CONFIG.method, Dinov2Config)
SHARED = replace(train_tiny.CONFIG.method, head=HEAD, kde_weight=0.05)
SEPARATE = replace(SHARED, patch_head=replace(HEAD, prototypes=20, scale="frozen"), koleo_pool=None, targets="centering")
DINO = DinoConfig(
    kind="dino", group=4, head=replace(HEAD, scale="frozen"), targets="centering", sinkhorn_iterations=3, centre_momentum=0.9,
    student_temp=0.1, teacher_temp=[0.04, 0.04], teacher_temp_warmup_steps=0, momentum=[0.9, 1.0], freeze_last_layer_steps=0,
)  # fmt: skip


@dataclass
class Step:
    """Both sides' total, terms and gradients by parameter name, and the next class centre."""

    total: tuple[Tensor, Tensor]
    terms: dict[str, tuple[Tensor, Tensor]]
    gradients: dict[str, tuple[Tensor, Tensor]]
    centre: tuple[Tensor, Tensor]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_step(model: ModelConfig, method: MethodConfig, dtype: torch.dtype, device: str = "cpu", bf16: bool = False) -> Step:
    """Ours in `dtype` on `device`, theirs in float64 on the CPU, on the same weights, views, masks and rows kept by stochastic
    depth. bf16: our forward under autocast.
    """
    student, teacher = (branch.double() for branch in build(model, method, 0))
    frozen = build_gram_teacher(model, method)
    with torch.no_grad():  # away from the symmetric start, and from each other
        for seed, module in enumerate((student, teacher, frozen)):
            for i, parameter in enumerate([] if module is None else module.double().parameters()):
                parameter.add_(0.05 * noise(*parameter.shape, seed=1000 * seed + i)).copy_(parameter.to(dtype))
    globals_, locals_ = (noise(n * B, 3, px, px, seed=px).to(dtype) for n, px in ((VIEWS, GLOBAL_PX), (LOCALS, LOCAL_PX)))
    masks = masks_at(model, method, 0, 0, torch.arange(B), GLOBAL_PX, VIEWS)
    if masks is not None:  # 1 / masked patches, which the masks hold in float32
        masks = masks._replace(weights=(1 / masks.crops.sum(1).to(dtype))[masks.indices // masks.crops.shape[1]])
    crops, indices = (masks.crops, masks.indices) if masks else (None, None)
    patch_prototypes = 0 if masks is None else (method.patch_head or method.head).prototypes  # type: ignore[union-attr]
    centres = Centres(0.1 * noise(24, seed=5).to(dtype), 0.1 * noise(patch_prototypes, seed=6).to(dtype))
    drawn = keys(0, "drop", 0, torch.arange(B))
    now = Scheduled(teacher_temp=TEMP, momentum=0.9, last_layer=True, gram_weight=0.7 if frozen else 0.0)

    for module in (student, teacher, frozen):
        module and module.to(device, dtype)
    large, small, hidden, at, rows = (x if x is None else x.to(device) for x in (globals_, locals_, crops, indices, drawn))
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        taught, learned = teacher(large, indices=at), student(large, small, hidden, at, rows)
        target = frozen(large, (4, 4)) if frozen else None
    placed = None if masks is None else Masks(*(x.to(device) for x in masks))
    ours = losses(learned, taught, placed, Centres(*(x.to(device) for x in centres)), method, now, VIEWS, gram=target)
    ours.total.backward()

    weights = {name: p.detach().cpu().double().requires_grad_() for name, p in student.named_parameters()}
    shape = (model.patch_size, 2, model.architecture.startswith("vit_giant"))
    kept = []
    for count, name in ((VIEWS, "global"), (LOCALS, "local")):
        rows = torch.cat([fork(drawn, f"{name}/{i}") for i in range(count)])
        kept.append(kept_rows(rows, count, method.group, model.drop_path, 4))
    with torch.no_grad():
        fixed = {name: p.cpu().double() for name, p in teacher.named_parameters()}
        t_cls, t_patches = restated.vit(fixed, globals_.double(), *shape)
    s_cls, s_patches = restated.vit(weights, globals_.double(), *shape, masks=crops, kept=kept[0])
    s_local, _ = restated.vit(weights, locals_.double(), *shape, kept=kept[1])

    def targets(logits: Tensor, centre: Tensor) -> Tensor:
        if method.targets == "sinkhorn":
            return restated.sinkhorn(logits, TEMP)
        return ((logits - centre.double()) / TEMP).softmax(-1)

    t_logits = restated.head(fixed, "head", t_cls)
    s_logits = restated.head(weights, "head", torch.cat([s_cls, s_local])).view(VIEWS + LOCALS, B, -1)
    terms = {"dino": restated.dino(s_logits, targets(t_logits, centres.cls).view(VIEWS, B, -1), 0.1)}
    total = terms["dino"]
    if isinstance(method, Dinov2Config):
        assert crops is not None
        name = "patch_head" if method.patch_head else "head"
        p_targets = targets(restated.head(fixed, name, t_patches[crops.view(VIEWS * B, -1)]), centres.patch)
        terms["ibot"] = restated.ibot(restated.head(weights, name, s_patches[crops]), p_targets, crops, 0.1)
        terms["koleo"] = sum(restated.koleo(z, method.koleo_pool or B) for z in s_cls.chunk(VIEWS))  # type: ignore[assignment]
        terms["kde"] = sum(restated.kde(z, method.kde_kappa, method.kde_pool or B) for z in s_cls.chunk(VIEWS))  # type: ignore[assignment]
        total = total + terms["ibot"] + 0.1 * terms["koleo"] + 0.05 * terms["kde"]
        if frozen:
            held = {name: p.cpu().double() for name, p in frozen.named_parameters()}
            terms["gram"] = restated.gram(s_patches, restated.vit(held, globals_.double(), *shape)[1])
            total = total + 0.7 * terms["gram"]
    total.backward()
    gradients = {name: (p.grad, weights[name].grad) for name, p in student.named_parameters()}
    grads = {name: (a.cpu(), b) for name, (a, b) in gradients.items() if a is not None and b is not None}
    assert grads.keys() == gradients.keys()
    centre = 0.9 * centres.cls.double() + 0.1 * t_logits.mean(0) if method.targets == "centering" else centres.cls.double()
    pairs = {name: (ours.terms[name].cpu(), value.detach()) for name, value in terms.items()}
    assert ours.terms.keys() == terms.keys()
    return Step((ours.total.detach().cpu(), total.detach()), pairs, grads, (ours.centres.cls.cpu(), centre))


CASES: dict[str, tuple[ModelConfig, MethodConfig]] = {
    "dino": (TINY, DINO),
    "shared head, Sinkhorn": (TINY, SHARED),
    "two heads, centring, Gram": (SWIGLU, replace(SEPARATE, gram=GRAM)),
    "SwiGLU, registers, Sinkhorn, Gram": (SWIGLU, replace(SHARED, gram=GRAM)),
}


@pytest.mark.parametrize("name", CASES)
def test_in_float64_all_agrees_to_ten_digits(name: str) -> None:
    step = one_step(*CASES[name], torch.float64)
    for ours, theirs in (step.total, *step.terms.values()):
        assert abs(ours - theirs) <= 1e-10 * abs(theirs), name
    for parameter, (got, wanted) in step.gradients.items():
        assert wanted.abs().max() > 0 and (got - wanted).abs().max() <= 1e-10 * wanted.abs().max(), parameter
    assert torch.allclose(*step.centre, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_in_float32_terms_agree_to_5e6_and_gradients_to_1e5(name: str) -> None:
    step = one_step(*CASES[name], torch.float32)
    for ours, theirs in (step.total, *step.terms.values()):
        assert ours.dtype == torch.float32 and abs(ours.double() - theirs) <= 5e-6 * abs(theirs), name
    for parameter, (got, wanted) in step.gradients.items():
        assert got.dtype == torch.float32, parameter
        assert (got.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max(), parameter


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", CASES)
def test_on_an_accelerator_terms_agree_to_1e5_and_gradients_to_1e4(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions use it unless told not to
    step = one_step(*CASES[name], torch.float32, device)
    for ours, theirs in (step.total, *step.terms.values()):
        assert abs(ours.double() - theirs) <= 1e-5 * abs(theirs), name
    for parameter, (got, wanted) in step.gradients.items():
        assert (got.double() - wanted).abs().max() <= 1e-4 * wanted.abs().max(), parameter


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", CASES)
def test_under_bf16_terms_agree_to_a_hundredth_and_stay_float32(name: str, device: str) -> None:
    step = one_step(*CASES[name], torch.float32, device, bf16=True)
    for term, (ours, theirs) in {"total": step.total, **step.terms}.items():
        assert ours.dtype == torch.float32, term
        assert abs(ours.double() - theirs) <= 1e-2 * theirs.abs().clamp(min=1), term  # KoLeo and KDE go through zero
    assert all(got.dtype == torch.float32 for got, _ in step.gradients.values())
