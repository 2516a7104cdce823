"""Losses of slide models against their definitions written out, and the optimisers' schedules."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from histoscale.eval.mil.losses import binary_loss, class_loss, cox_loss
from histoscale.eval.mil.optimizer import Optimizer, OptimizerConfig, ScheduleConfig, learning_rate, weight_decay

CONSTANT = ScheduleConfig(0, 0.0, False, "constant", 0.0)


def test_weighted_cross_entropies() -> None:
    logits = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    p = 1 / (1 + np.exp(-logits[:, 0].numpy()))
    found = binary_loss(logits, torch.tensor([1.0, 0.0]), torch.tensor(3.0))
    np.testing.assert_allclose(found, [-3 * np.log(p[0]), -np.log(1 - p[1])])
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    found = class_loss(logits, torch.tensor([0, 2]), torch.tensor([0.5, 1.0, 2.0]))
    np.testing.assert_allclose(found, [-0.5 * np.log(p[0, 0]), -2 * np.log(p[1, 2])])


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.floats(-3, 3)), min_size=1, max_size=9),
    shift=st.floats(-5, 5),
)
def test_cox_is_the_partial_likelihood_with_breslow_ties(rows: list[tuple[int, bool, float]], shift: float) -> None:
    """Written out event by event; a constant on all log-risks changes nothing, as the baseline hazard takes it."""
    when, happened, given_risks = zip(*rows, strict=True)
    times, events, risks = torch.tensor(when), torch.tensor(happened), torch.tensor(given_risks, dtype=torch.float64)
    terms = [math.log(sum(math.exp(risk) for time, _, risk in rows if time >= when)) - own for when, seen, own in rows if seen]
    expected = sum(terms) / max(len(terms), 1)
    assert cox_loss(risks, times, events).item() == pytest.approx(expected, abs=1e-9)
    assert cox_loss(risks + shift, times, events).item() == pytest.approx(expected, abs=1e-6)


def test_cox_without_an_event_is_zero_with_a_gradient() -> None:
    risks = torch.zeros(3, requires_grad=True)
    loss = cox_loss(risks, torch.arange(3.0), torch.zeros(3, dtype=torch.bool))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and risks.grad is not None and (risks.grad == 0).all()


def test_learning_rates_and_decays() -> None:
    config = OptimizerConfig("adamw", 1.0, 0.04, 0.4, True, None)
    falling = ScheduleConfig(2, 0.0, False, "cosine", 0.1)
    rates = [learning_rate(step, 10, 4, config, falling) for step in range(10)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1]) and rates[7] == pytest.approx(0.55) and rates[9] > 0.1
    held = ScheduleConfig(5, 1 / 3, True, "constant", 0.0)
    assert [learning_rate(step, 10, 5, config, held) for step in (0, 4, 5, 9)] == pytest.approx([1 / 3, 1 / 3, 1, 1])
    assert [weight_decay(step, 10, config) for step in (0, 5)] == pytest.approx([0.04, 0.22])


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("adamw", lambda w: torch.optim.AdamW(w, lr=0.1, weight_decay=0.2)),
        ("adam", lambda w: torch.optim.Adam(w, lr=0.1, weight_decay=0.2)),
        ("radam", lambda w: torch.optim.RAdam(w, lr=0.1, weight_decay=0.2, decoupled_weight_decay=True)),
    ],
)
def test_without_lookahead_and_schedule_they_are_torchs(kind: str, reference: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    ours, theirs, x = nn.Linear(3, 1), nn.Linear(3, 1), torch.randn(8, 3)
    theirs.load_state_dict(ours.state_dict())
    one, two = Optimizer(ours, 9, 3, OptimizerConfig(kind, 0.1, 0.2, 0.2, True, None), CONSTANT), reference(theirs.parameters())
    for _ in range(9):
        one.step(ours(x).square().mean())
        two.zero_grad()
        theirs(x).square().mean().backward()
        two.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_lookahead_goes_back_half_the_way() -> None:
    """Two fast steps, then the mean of where they began and where they ended, from which the next two start."""
    torch.manual_seed(0)
    fast, slow, x = nn.Linear(3, 1), nn.Linear(3, 1), torch.randn(8, 3)
    slow.load_state_dict(fast.state_dict())
    plain = Optimizer(fast, 4, 4, OptimizerConfig("adamw", 0.1, 0.0, 0.0, True, None), CONSTANT)
    looking = Optimizer(slow, 4, 4, OptimizerConfig("adamw", 0.1, 0.0, 0.0, True, 2), CONSTANT)
    start = fast.weight.detach().clone()
    for _ in range(2):
        plain.step(fast(x).square().mean())
        looking.step(slow(x).square().mean())
    torch.testing.assert_close(slow.weight, (start + fast.weight) / 2)


@pytest.mark.parametrize("kind", ["sgd", ""])
def test_unknown_names(kind: str) -> None:
    with pytest.raises(ValueError, match="expected adamw, adam, radam"):
        OptimizerConfig(kind, 0.1, 0.0, 0.0, True, None)
    with pytest.raises(ValueError, match="expected cosine or constant"):
        ScheduleConfig(0, 0.0, False, kind, 0.0)
    with pytest.raises(ValueError, match="expected null or a number"):
        OptimizerConfig("adam", 0.1, 0.0, 0.0, True, 0)


def test_decay_may_leave_vectors_alone() -> None:
    """With no gradient at all, only what is decayed shrinks."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = Optimizer(model, 4, 4, OptimizerConfig("adamw", 0.1, 0.5, 0.5, False, None), CONSTANT)
    for _ in range(4):
        optimizer.step(0 * model(torch.zeros(1, 3)).sum())
    torch.testing.assert_close(model.weight, before["weight"] * 0.95**4)
    torch.testing.assert_close(model.bias, before["bias"])
