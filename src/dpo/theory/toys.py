"""Small seeded objects and numerical tools for the checks: nothing here knows any of the
formulas.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def generator(seed: int) -> torch.Generator:
    """A seeded source of randomness."""
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def vector(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def log_policy(seed: int, *shape: int) -> Tensor:
    """Log-probabilities of a random full-support policy over the last dimension."""
    return torch.log_softmax(normal(seed, *shape), dim=-1)


def all_rankings(num_items: int) -> Tensor:
    """Every ranking of the items, (K!, K), best first."""
    return torch.tensor(list(itertools.permutations(range(num_items))))


def draw(probs: Tensor, num_samples: int, seed: int) -> Tensor:
    """Independent draws from a finite distribution, (num_samples,) indices."""
    return torch.multinomial(probs, num_samples, replacement=True, generator=generator(seed))


def coin(probs: Tensor, seed: int) -> Tensor:
    """Independent Bernoulli outcomes, 0.0 or 1.0, with the given probabilities."""
    return torch.bernoulli(probs, generator=generator(seed))


def deviation(first: Tensor, second: Tensor | float) -> float:
    """Largest absolute difference."""
    return float((first - second).abs().max())


def z_score(samples: Tensor, expected: Tensor | float) -> float:
    """Largest |sample mean - expected| in standard errors, for samples (n, ...)."""
    mean = samples.mean(dim=0)
    standard_error = samples.std(dim=0) / samples.shape[0] ** 0.5
    return float(((mean - expected).abs() / (standard_error + 1e-12)).max())


def frequency_z(counts: Tensor, probs: Tensor) -> float:
    """Largest z-score of observed counts against probabilities."""
    total = counts.sum()
    return float(((counts / total - probs) / (probs * (1 - probs) / total).sqrt()).abs().max())


def gradient(function: Function, at: Tensor, *, step: float = 1e-5) -> Tensor:
    """Central finite differences of a scalar function."""
    slopes: list[Tensor] = []
    for index in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[index] = step
        shift = shift.reshape(at.shape)
        slopes.append((function(at + shift) - function(at - shift)) / (2 * step))
    return torch.stack(slopes).reshape(at.shape)


def jacobian(function: Function, at: Tensor) -> Tensor:
    """Derivatives of a vector function by automatic differentiation, (outputs, inputs)."""
    rows: list[Tensor] = []
    point = at.detach().requires_grad_()
    outputs = function(point)
    for output in outputs.flatten():
        rows.append(torch.autograd.grad(output, point, retain_graph=True)[0].flatten())
    return torch.stack(rows).reshape(*outputs.shape, -1)


def hessian(function: Function, at: Tensor) -> Tensor:
    """Second derivatives of a scalar function by automatic differentiation."""
    point = at.detach().requires_grad_()
    slope = torch.autograd.grad(function(point), point, create_graph=True)[0]
    rows = [torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in slope]
    return torch.stack(rows)


def minimise(function: Function, start: Tensor) -> Tensor:
    """A local minimiser of a smooth function of a vector: quasi-Newton, then Newton steps.

    The Newton steps use a pseudo-inverse, so directions along which the function is flat (the
    constant of a reward) keep the value that they had.
    """
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=150,
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = function(point)
        value.backward()
        return value

    optimiser.step(closure)
    found = point.detach()
    for _ in range(3):
        leaf = found.clone().requires_grad_()
        slope = torch.autograd.grad(function(leaf), leaf)[0]
        found = found - torch.linalg.pinv(hessian(function, found), rtol=1e-9) @ slope
    return found


def minimise_scalar(function: Callable[[float], float], low: float, high: float) -> float:
    """The minimiser of a unimodal function on an interval, by golden-section search."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(100):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """The zero of an increasing function on an interval, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
