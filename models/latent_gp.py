"""Gaussian processes with any likelihood: each task's function is a vector of weights on fixed basis functions.

    f_i(x) = m_i + Σ_j √S(ω_j; l_i, s_i) w_ij b_j(x),   w_ij ~ N(0, 1),   y ~ p(y | f_i(x))
    φ_i = (log l_i, log s_i, m_i, w_i),   (log l_i, log s_i, m_i) ~ N(μ, diag τ²)

The b_j are eigenfunctions of the Laplacian on a box around the inputs, S is the spectral density of the kernel with
length l and scale s. The approximation is good for lengths between about span / 8 and span / 1.5 with the defaults; far
from the inputs the functions return to m.

Inference of φ: Laplace proposals, weighed, and Markov chains where these fail. Objective: the evidence of the tasks,
`bm.Marginal(shared="map")`; from very many tasks `bm.Amortized(shared="map")` learns. With normal labels
`hierarchical_gp` is exact and faster.

References:
    Solin, Särkkä: Hilbert Space Methods for Reduced-Rank Gaussian Process Regression, 2020,
    https://arxiv.org/abs/1401.5508
    Riutort-Mayol, Bürkner, Andersen, Solin, Vehtari: Practical Hilbert Space Approximate Bayesian Gaussian Processes
    for Probabilistic Programming, 2023, https://arxiv.org/abs/2004.11408
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import bayesmeta as bm

EDGE = 2.0
"""Half the width of the box, in spans: functions are 0 at its edge."""
OWN = 3
"""Numbers of a task before its weights: log length, log scale, mean."""


def build(
    likelihood: Any,
    *,
    span: float,
    kernel: str = "rbf",
    dim: int = 1,
    basis: int = 24,
) -> bm.HierarchicalModel:
    """A hierarchical model of functions, to be fitted by `bm.fit(model, tasks, method=bm.Marginal(shared="map"))`.

    Args:
        likelihood: One of `bm.likelihoods`, or a function of any of `(f, batch, shared)`, with f `(T, N)`.
        span: Inputs lie in [-span, span], in every dimension; others are taken for the nearest point in 1.8 spans.
        kernel: "rbf" or "matern52"; its length is the same in all dimensions.
        dim: Numbers of an input.
        basis: Basis functions a dimension; φ has 3 + basisᵈⁱᵐ numbers.

    Returns:
        A model with the task site `phi`, (log length, log scale, mean, weights), and the shared sites `mu` and `tau` of
        its first three numbers and those of the likelihood. Lengths are in the units of x, scales in those of f.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> import bayesmeta as bm
        >>> bm.models.latent_gp.build(bm.likelihoods.Poisson(), span=2.0)
        HierarchicalModel(phi: Callable, y: Poisson, shared: mu, tau)
    """
    if kernel not in ("rbf", "matern52"):
        raise ValueError(f'latent_gp: expected kernel="rbf" or "matern52", got {kernel!r}')
    if not 0 < span < math.inf:
        raise ValueError(f"latent_gp: expected span, half the range of the inputs, as a positive number, got {span!r}")
    for name, value in {"dim": dim, "basis": basis}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"latent_gp: expected {name} as a whole number ≥ 1, got {value!r}")
    function = Function(kernel, dim, span, basis)
    typical = torch.tensor([math.log(span / 3), 0.0, 0.0])
    shared = {
        "mu": dist.Normal(typical, torch.tensor([0.7, 1.0, 2.0])).to_event(1),
        "tau": dist.HalfNormal(torch.tensor([0.5, 0.7, 1.5])).to_event(1),
    }

    def prior(shared: Mapping[str, Tensor]) -> Distribution:
        zero = torch.zeros(function.weights, dtype=shared["mu"].dtype)
        return dist.Normal(torch.cat([shared["mu"], zero]), torch.cat([shared["tau"], zero + 1])).to_event(1)

    return bm.HierarchicalModel(prior, function, likelihood, shared=shared)


class Function(nn.Module):
    """f `(T, N)` from φ `(T, 1, 3 + weights)` and x `(T, N, dim)`.

    Attributes:
        weights: How many basis functions there are in all.
    """

    frequencies: Tensor

    def __init__(self, kernel: str, dim: int, span: float, basis: int) -> None:
        super().__init__()
        self.kernel, self.dim, self.span = kernel, dim, span
        one = torch.arange(1, basis + 1, dtype=torch.float64) * math.pi / (2 * EDGE * span)
        self.register_buffer("frequencies", torch.cartesian_prod(*[one] * dim).reshape(-1, dim))
        self.weights = basis**dim

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """The functions of the tasks at their rows."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"latent_gp: expected inputs of shape (tasks, rows, {self.dim}), got {tuple(x.shape)}; say "
                f"dim={x.shape[-1]}"
            )
        log_length, log_scale, mean = phi[..., :OWN].unbind(-1)
        root = (log_scale.unsqueeze(-1) + 0.5 * self._log_density(log_length)).exp()
        return mean + (root * phi[..., OWN:] * self._basis(x)).sum(-1)

    def _basis(self, x: Tensor) -> Tensor:
        """Eigenfunctions `(T, N, weights)`."""
        edge = EDGE * self.span
        inside = x.clamp(-0.9 * edge, 0.9 * edge).unsqueeze(-2) + edge
        return (torch.sin(self.frequencies.to(x.dtype) * inside) / edge**0.5).prod(-1)

    def _log_density(self, log_length: Tensor) -> Tensor:
        """Log spectral density of a kernel of scale 1 at every frequency `(T, 1, weights)`."""
        square = self.frequencies.to(log_length.dtype).square().sum(-1)
        length, half = log_length.unsqueeze(-1), self.dim / 2
        scaled = square * (2 * length).exp()
        if self.kernel == "rbf":
            return half * math.log(2 * math.pi) + self.dim * length - 0.5 * scaled
        power = 2.5 + half
        front = self.dim * math.log(2) + half * math.log(math.pi) + math.lgamma(power) - math.lgamma(2.5)
        return front + 2.5 * math.log(5) + self.dim * length - power * (5 + scaled).log()
