"""Draws of a density of few dimensions by tempered adaptive importance sampling: no gradients, nothing to train.

The proposal is a t(5); it moves from where it starts to the target in steps that keep enough of its weights alive.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bayesmeta.inference import psis
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.gaussian import heavy_scale, student_t_log_prob

MAX_ROUNDS = 100
ALIVE = 0.25
"""Relative effective sample size that every round keeps."""
WIDTH = 1.15
"""How much wider than the weighted draws the next proposal is."""
PILOT_PER_DIMENSION = 100


def adaptive_draws(log_target: Callable[[Tensor], Tensor], loc: Tensor, scale: Tensor, *, draws: int) -> SharedDraws:
    """Weighted draws of a density.

    Args:
        log_target: Unnormalised log density, `(S, d)` -> `(S,)`.
        loc: Where to start `(d,)`.
        scale: Standard deviations to start with `(d,)`, wide enough to reach the target.
        draws: How many; weights are smoothed, k̂ and the relative effective sample size reported.

    Raises:
        ValueError: The target is too far away or too unlike a t.

    References:
        Del Moral, Doucet, Jasra: Sequential Monte Carlo Samplers, 2006,
        https://doi.org/10.1111/j.1467-9868.2006.00553.x
    """
    dim = len(loc)
    if dim == 0:
        return SharedDraws(loc.expand(draws, 0), np.full(draws, -np.log(draws)), 0.0, 1.0, "sampled")
    mean, factor = loc, torch.diag(scale)
    for _ in range(MAX_ROUNDS):
        theta, log_weight = _weighted(log_target, mean, factor, PILOT_PER_DIMENSION * (dim + 1))
        power = _largest_power(log_weight)
        share = (power * log_weight).softmax(0)
        mean = share @ theta
        centred = theta - mean
        factor = WIDTH * torch.linalg.cholesky(centred.mT @ (share.unsqueeze(-1) * centred))
        if power == 1.0:
            theta, log_weight = _weighted(log_target, mean, factor, draws)
            smoothed, khat = psis.smooth(log_weight.numpy())
            status = "corrected" if khat < psis.khat_limit(draws) else "uncorrected"
            return SharedDraws(theta, smoothed, float(khat), float(psis.relative_ess(smoothed)), status)
    raise ValueError(
        f"importance sampling of {dim} shared parameters did not reach their posterior in {MAX_ROUNDS} rounds; "
        "use fewer shared parameters, or tighter priors"
    )


def _weighted(
    log_target: Callable[[Tensor], Tensor], mean: Tensor, factor: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    noise = torch.randn(count, len(mean), dtype=mean.dtype)
    noise = noise * heavy_scale((count, 1), noise)
    theta = mean + noise @ factor.mT
    log_proposal = student_t_log_prob(noise.square().sum(-1), -factor.diagonal().log().sum(), len(mean))
    log_weight = log_target(theta) - log_proposal
    if not bool(torch.isfinite(log_weight).any()):
        raise ValueError("the log density is nowhere finite under its prior; check the data and the priors")
    return theta, torch.nan_to_num(log_weight, nan=-torch.inf).clamp(min=-1e30)


def _largest_power(log_weight: Tensor) -> float:
    """The largest power ≤ 1 of the weights that keeps `ALIVE` of them effective, by bisection."""
    if float(psis.relative_ess(log_weight.numpy())) >= ALIVE:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        alive = float(psis.relative_ess(middle * log_weight.numpy())) >= ALIVE
        low, high = (middle, high) if alive else (low, middle)
    return low
