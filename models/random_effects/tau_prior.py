"""Any proper prior of one scale, as the quadrature over tau needs it: in float64, with marks where its mass lies.

A distribution of torch or Pyro, or a function that returns a log density. `tau_posterior.py` integrates over it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributions import Distribution, Transform

Function = Callable[[np.ndarray], np.ndarray]

FAR = 300.0
"""tau is integrated from e^-300 to e^300 typical standard errors; its square is still a number there."""


class TauPrior:
    """A proper prior of a scale: its log density, its support, and marks where its mass lies.

    Args:
        prior: A scalar distribution on `[0, inf)`, or a function from an array of scales to the log of a density.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, prior: Distribution | Function) -> None:
        self.low, self.high, self.marks = 0.0, math.inf, np.empty(0)
        self._function: Any = prior
        if isinstance(prior, Distribution):
            if prior.batch_shape or prior.event_shape:
                shape = (*prior.batch_shape, *prior.event_shape)
                raise ValueError(f"tau_prior: expected the distribution of one scale, got one of shape {shape}")
            self._read(_in_double(prior))
        elif not callable(prior):
            raise ValueError(
                "tau_prior: expected a distribution on [0, inf) such as dist.HalfNormal(1.), or a function that "
                f"returns its log density, got {type(prior).__name__}"
            )

    def _read(self, prior: Distribution) -> None:
        support = prior.support
        self.low = max(0.0, float(getattr(support, "lower_bound", 0.0)))
        self.high = float(getattr(support, "upper_bound", math.inf))
        self._function = lambda tau: prior.log_prob(torch.from_numpy(tau)).numpy()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn = np.sort(prior.sample(torch.Size([257])).double().numpy())
        marks = np.log(drawn[(drawn > 0) & np.isfinite(drawn)])[::16]
        if len(marks):
            # The tails of a narrow prior would fall between the nodes of the wide panels beside it.
            reach = np.ptp(marks) * 2.0 ** np.arange(64)
            reach = reach[reach < 1]
            self.marks = np.concatenate([marks, marks[0] - reach, marks[-1] + reach])

    def log_density(self, tau: np.ndarray) -> np.ndarray:
        """Log density at scales of any shape; -inf outside the support.

        Raises:
            ValueError: If it is NaN, +inf at a positive scale, or of another shape.
        """
        tau = np.asarray(tau, dtype=float)
        inside = (tau >= self.low) & (tau <= self.high)
        out = np.full(tau.shape, -np.inf)
        found = np.asarray(self._function(tau[inside]), dtype=float)
        if found.shape != tau[inside].shape:
            raise ValueError(f"tau_prior: expected a log density of shape {tau[inside].shape}, got {found.shape}")
        wrong = np.isnan(found) | (np.isposinf(found) & (tau[inside] > 0))
        if wrong.any():
            raise ValueError(
                f"tau_prior: its log density is {found[wrong][0]} at tau = {tau[inside][wrong][0]:.6g}; "
                "expected numbers, and -inf where tau cannot be"
            )
        out[inside] = found
        return out

    def edges(self, scales: tuple[float, float]) -> np.ndarray:
        """Ends of the first panels in log tau: of width 1 between two scales of the data, growing beyond them."""
        first, last = math.log(scales[0]), math.log(scales[1])
        fine = np.linspace(first, last, 1 + math.ceil(last - first))
        steps = np.append(2.0 ** np.arange(9), FAR)
        ends = np.array([math.log(end) if 0 < end < math.inf else np.nan for end in (self.low, self.high)])
        every = np.concatenate([fine, self.marks, first - steps, last + steps, ends])
        low, high = np.fmax(first - FAR, ends[0]), np.fmin(last + FAR, ends[1])
        return np.unique(every[(every >= low) & (every <= high)])


def _in_double(thing: Any) -> Any:
    """A copy of a distribution that computes in float64 and does not validate; torch's half-Cauchy casts scales."""
    if isinstance(thing, torch.Tensor):
        return thing.detach().double() if thing.is_floating_point() else thing.detach()
    if isinstance(thing, list | tuple):
        return type(thing)(_in_double(part) for part in thing)
    if not isinstance(thing, Distribution | Transform):
        return thing
    out = copy.copy(thing)
    vars(out).update({name: _in_double(part) for name, part in vars(thing).items()}, _validate_args=False)
    return out
