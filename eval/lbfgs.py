"""L-BFGS (Nocedal 1980, doi 10.1090/S0025-5718-1980-0572855-7) on many smooth convex functions at once, on any device.

Every problem has its own history, its own step length and its own end; one evaluation serves all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# points float64 [F, N] -> values float64 [F], gradients float64 [F, N]
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
REFUSALS = 12  # shortened steps in a row after which only rounding is left to follow


@dataclass(frozen=True)
class Minimum:
    """point: [F, N]. left: [F], √(gᵀHg) with H the inverse Hessian that L-BFGS estimates: the distance to the minimum in the
    Hessian's metric, and half its square what the value may still fall. evaluations: of the objective, which serve all F."""

    point: Tensor
    value: Tensor
    left: Tensor
    evaluations: int


def minimise(
    objective: Objective, start: Tensor, scale: Tensor, tolerance: float, max_iterations: int, memory: int, slack: float
) -> Minimum:
    """Until every problem has `left` below the tolerance, or no step helps any more.

    start: float64 [F, N]. scale: float64, broadcast to [F, N]: a diagonal guess of the inverse Hessian. memory: pairs kept.
    slack: relative rounding of a value. A step t along d is taken when the value does not rise and the slope has not turned
    up beyond .9 of what it was: with convex functions both can be trusted, the slope far below the rounding of the value
    (Hager and Zhang 2005, doi 10.1137/030601880). Else t shrinks to where the slope would vanish.
    """
    point = start.clone()
    value, gradient = objective(point)
    problems, size = point.shape
    steps = point.new_zeros(memory, problems, size)  # newest last; zeros where there is none
    changes = torch.zeros_like(steps)
    direction = -scale * gradient
    slope = (gradient * direction).sum(1)
    length, refused = torch.ones_like(slope), torch.zeros_like(slope)
    evaluations, open_ = 1, slope.abs().sqrt() >= tolerance
    while bool(open_.any()) and evaluations <= max_iterations:
        step = torch.where(open_[:, None], length[:, None] * direction, 0.0)
        new_value, new_gradient = objective(point + step)
        evaluations += 1
        new_slope = (new_gradient * direction).sum(1)
        good = (new_value <= value + slack * value.abs()) & (new_slope <= -0.9 * slope)
        taken = open_ & good
        shrink = slope.abs() / (slope.abs() + new_slope.clamp(min=0) + torch.finfo(slope.dtype).tiny)
        length = torch.where(good, 1.0, length * shrink.nan_to_num(0.1).clamp(0.1, 0.7))
        refused = torch.where(good, 0.0, refused + 1)
        if bool(taken.any()):
            for history, newest in ((steps, step), (changes, new_gradient - gradient)):
                history[:, taken] = torch.cat([history[1:, taken], newest[None, taken]])
            point = torch.where(taken[:, None], point + step, point)
            value = torch.where(taken, new_value, value)
            gradient = torch.where(taken[:, None], new_gradient, gradient)
            direction = torch.where(taken[:, None], -_inverse(gradient, steps, changes, scale), direction)
            slope = (gradient * direction).sum(1)
        open_ = open_ & (slope.abs().sqrt() >= tolerance) & (refused < REFUSALS)
    return Minimum(point, value, slope.abs().sqrt(), evaluations)


def _inverse(gradient: Tensor, steps: Tensor, changes: Tensor, scale: Tensor) -> Tensor:
    """The two-loop recursion: the estimated inverse Hessian times the gradient, [F, N]."""
    curvature = (steps * changes).sum(2)
    inverse = torch.where(curvature > 0, 1 / curvature, 0.0)  # a pair without curvature, or none yet, has no say
    rest, weights = gradient.clone(), []
    for i in reversed(range(len(steps))):
        weight = inverse[i] * (steps[i] * rest).sum(1)
        weights.append(weight)
        rest -= weight[:, None] * changes[i]
    length = (changes[-1] * scale * changes[-1]).sum(1)
    factor = torch.where((curvature[-1] > 0) & (length > 0), curvature[-1] / length, 1.0)
    found = factor[:, None] * scale * rest
    for i, weight in enumerate(reversed(weights)):
        found += (weight - inverse[i] * (changes[i] * found).sum(1))[:, None] * steps[i]
    return found
