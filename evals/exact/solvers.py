"""The exact side where no formula is known: roots, Newton's method and SLSQP, in float64 on the CPU.

None of it shares code with the losses or with the policies' tables: optima are found over the answers' values or
log-probs themselves, from formulas that are written here and in the targets anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq, minimize
from torch import Tensor
from torch.func import grad, hessian

Objective = Callable[[Tensor], Tensor]


def normalised(log_weights: Tensor) -> Tensor:
    """``exp(log_weights) / Z`` over the last dimension."""
    return log_weights.softmax(-1)


def per_token(rate: Tensor, length: Tensor, reference: Tensor) -> Tensor:
    """``mu exp(|y| (a + c))`` with the root c at which it sums to 1, for each prompt.

    What a loss on means per token asks for: it fixes the differences of log-ratios per token, and the shift c that
    makes them a distribution enters times the length, so that dividing by Z is not it.

    Args:
        rate: wanted log-ratios per token up to a shift, a, (P, N).
        length: (N,).
        reference: log mu, (P, N); zeros for a loss without reference.
    """
    size = length.double()

    def excess(c: float, row: int) -> float:
        return float((reference[row] + size * (rate[row] + c)).logsumexp(-1))

    roots = [root(lambda c, row=row: excess(c, row)) for row in range(len(rate))]  # type: ignore[misc]
    shift = torch.tensor(roots, dtype=torch.float64)[:, None]
    return (reference + size * (rate + shift)).exp()


def odds(reward: Tensor, length: Tensor) -> Tensor:
    """``sigma(r + c)^|y|`` with the root c at which it sums to 1: mean probabilities with odds in ratio exp(r)."""
    size = length.double()

    def excess(c: float, row: int) -> float:
        return float((size * torch.nn.functional.logsigmoid(reward[row] + c)).logsumexp(-1))

    roots = [root(lambda c, row=row: excess(c, row)) for row in range(len(reward))]  # type: ignore[misc]
    shift = torch.tensor(roots, dtype=torch.float64)[:, None]
    return (size * torch.nn.functional.logsigmoid(reward + shift)).exp()


def root(f: Callable[[float], float]) -> float:
    """The root of an increasing function, bracketed outwards from [-1, 1]."""
    low, high = -1.0, 1.0
    while f(low) > 0:
        low *= 2
    while f(high) < 0:
        high *= 2
    return float(brentq(f, low, high, xtol=1e-15, rtol=1e-14))


def newton(objective: Objective, start: Tensor, *, steps: int = 100) -> Tensor:
    """The minimum of a smooth convex function by damped Newton steps; along flat directions (shifts) it stays.

    Args:
        objective: of a vector (N,).
        start: (N,) float64.

    Raises:
        RuntimeError: the gradient did not vanish.
    """
    x = start.clone()
    for _ in range(steps):
        slope = grad(objective)(x)
        if float(slope.abs().max()) < 1e-12:
            return x
        step = torch.linalg.pinv(hessian(objective)(x), rtol=1e-12) @ slope
        size = 1.0
        while size > 1e-10 and float(objective(x - size * step)) > float(objective(x)) - 1e-4 * size * float(
            slope @ step
        ):
            size /= 2
        if size <= 1e-10:  # rounding decides the value: the last steps are plain
            size = 1.0
        x = x - size * step
    if float(grad(objective)(x).abs().max()) > 1e-9:
        raise RuntimeError(f"Newton's method ended at a slope of {float(grad(objective)(x).abs().max()):.1e}")
    return x


def constrained(objective: Objective, start: Tensor, *, steps: int = 200) -> Tensor:
    """The log-probs S (N,) at which a smooth function is stationary among those with ``sum exp(S) = 1``.

    SLSQP finds the neighbourhood, Newton on ``grad f + m grad logsumexp = 0`` the point. For a convex function that
    falls when every log-prob rises it is the minimum: the set ``sum exp(S) <= 1`` is convex and its edge is best.

    Raises:
        RuntimeError: it did not converge.
    """
    near = minimize(
        lambda s: float(objective(torch.from_numpy(s))),
        start.numpy(),
        jac=lambda s: grad(objective)(torch.from_numpy(s)).numpy(),
        constraints=[
            {
                "type": "eq",
                "fun": lambda s: float(torch.from_numpy(s).logsumexp(-1)),
                "jac": lambda s: torch.from_numpy(s).softmax(-1).numpy(),
            }
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    s = torch.from_numpy(near.x)
    multiplier = -grad(objective)(s).sum()
    for _ in range(steps):
        p = s.softmax(-1)
        slope = grad(objective)(s)
        residual = torch.cat([slope + multiplier * p, s.logsumexp(-1)[None]])
        if float(residual.abs().max()) < 1e-13:
            break
        curve = hessian(objective)(s) + multiplier * (torch.diag(p) - torch.outer(p, p))
        system = torch.zeros(len(s) + 1, len(s) + 1, dtype=torch.float64)
        system[:-1, :-1], system[:-1, -1], system[-1, :-1] = curve, p, p
        step = torch.linalg.solve(system, residual)
        s, multiplier = s - step[:-1], multiplier - step[-1]
    if not float(residual.abs().max()) < 1e-9:
        raise RuntimeError(f"no stationary point found: residual {float(residual.abs().max()):.1e}")
    return s


def epigraph(
    objective: Callable[[Tensor, Tensor], Tensor], rows: Tensor, offsets: Tensor, edge: Tensor | None
) -> Tensor:
    """The minimum x (N,) of ``f(x, max(0, offsets + rows x))`` for a convex f that rises in its second argument.

    SLSQP on x and one slack ``t_k >= max(0, offset_k + row_k x)`` for each hinge: without kinks.

    Args:
        objective: f of x (N,) and t (K,).
        rows, offsets: (K, N) and (K,).
        edge: log-weights (N,) with which ``sum exp(edge + x) <= 1`` must hold; None: x is free.

    Raises:
        RuntimeError: it did not converge.
    """
    k, n = rows.shape
    below = torch.cat([-rows, torch.eye(k, dtype=torch.float64)], dim=1).numpy()
    constraints: list[dict[str, Any]] = [
        {"type": "ineq", "fun": lambda z: below @ z - offsets.numpy(), "jac": lambda z: below}
    ]
    if edge is not None:
        weights = edge.exp().numpy()
        constraints.append(
            {
                "type": "ineq",
                "fun": lambda z: np.array([1 - weights @ np.exp(z[:n])]),
                "jac": lambda z: np.concatenate([-weights * np.exp(z[:n]), np.zeros(k)])[None],
            }
        )

    def value(z: Tensor) -> Tensor:
        return objective(z[:n], z[n:])

    found = minimize(
        lambda z: float(value(torch.from_numpy(z))),
        torch.cat([torch.zeros(n, dtype=torch.float64), offsets.clamp(min=0) + 0.1]).numpy(),
        jac=lambda z: grad(value)(torch.from_numpy(z)).numpy(),
        bounds=[(None, None)] * n + [(0, None)] * k,
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    if not found.success:
        raise RuntimeError(f"SLSQP: {found.message}")
    return torch.from_numpy(found.x[:n])
