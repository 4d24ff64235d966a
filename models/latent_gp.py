"""Gaussian processes with any likelihood: each task's function is a vector of weights on fixed basis functions.

    f_i(x) = m_i + Σ_j √S(ω_j; l_i, s_i) w_ij b_j(x),   w_ij ~ N(0, 1),   y ~ p(y | f_i(x))
    φ_i = (log l_i, log s_i, m_i, w_i),   (log l_i, log s_i, m_i) ~ N(μ, diag τ²)

The b_j are eigenfunctions of the Laplacian on a box twice as wide as the range of the training inputs, which is [-1, 1]
in the model's units; S is the spectral density of the kernel with length l and scale s. With the defaults for one input
covariances are right to .02 s² ("rbf") for lengths from 1/8 to 2/3 of half the range; "matern52" is off by up to .07 s²
for the shortest. Outside of 1.8 half ranges functions are held constant.

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
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.arguments import check_tasks

EDGE = 2.0
"""Half the width of the box, in half ranges of the inputs: functions are 0 at its edge."""
BASIS, MOST_WEIGHTS = (24, 10, 6), 1000
"""Basis functions a dimension for one, two and three inputs; and in all at most."""
OWN = 3
"""Numbers of a task before its weights: log length, log scale, mean."""


def build(
    tasks: bm.Tasks, likelihood: Any, *, kernel: Literal["rbf", "matern52"] = "rbf", basis: int | None = None
) -> bm.HierarchicalModel:
    """A hierarchical model of functions, to be fitted by `bm.fit(model, tasks, method=bm.Marginal(shared="map"))`.

    Args:
        tasks: Training tasks, or others like them: they give the range of the inputs.
        likelihood: One of `bm.likelihoods`, or a function of any of `(f, batch, shared)`, with f `(T, N)` of order one:
            give labels with units in standard ones.
        kernel: "rbf" or "matern52"; its length is the same in all dimensions, in half ranges of the inputs.
        basis: Basis functions a dimension; None: 24, 10 or 6 for one, two or three inputs. φ has 3 + basisᵈ numbers.

    Returns:
        A model with the task site `phi`, (log length, log scale, mean, weights), and the shared sites `mu` and `tau` of
        its first three numbers and those of the likelihood.

    Raises:
        ValueError: If an option is out of range, or the tasks have no inputs, more than three, or constant ones.
    """
    check_tasks("latent_gp", tasks)
    if kernel not in ("rbf", "matern52"):
        raise ValueError(f'latent_gp: expected kernel="rbf" or "matern52", got {kernel!r}')
    function = Function(kernel, *_range(tasks), _basis(basis, math.prod(tasks.schema.x_shape)))
    shared = {
        "mu": dist.Normal(torch.tensor([math.log(1 / 3), 0.0, 0.0]), torch.tensor([0.5, 1.0, 2.0])).to_event(1),
        "tau": dist.HalfNormal(torch.tensor([0.3, 0.7, 1.5])).to_event(1),
    }

    def prior(shared: Mapping[str, Tensor]) -> Distribution:
        zero = torch.zeros(function.weights, dtype=shared["mu"].dtype)
        return dist.Normal(torch.cat([shared["mu"], zero]), torch.cat([shared["tau"], zero + 1])).to_event(1)

    return bm.HierarchicalModel(prior, function, likelihood, shared=shared)


def _range(tasks: bm.Tasks) -> tuple[Tensor, Tensor]:
    """Centres and half ranges of the inputs `(dim,)`."""
    if len(tasks.schema.x_shape) != 1 or not 1 <= tasks.schema.x_shape[0] <= len(BASIS):
        raise ValueError(f"latent_gp: expected one to three inputs a row, got inputs of shape {tasks.schema.x_shape}")
    low, high = tasks.x.double().aminmax(dim=0)
    if not bool((high > low).all()):
        constant = int((high <= low).nonzero()[0])
        raise ValueError(
            f"latent_gp: expected inputs that differ, got {float(low[constant])} alone in input {constant}"
        )
    return (low + high) / 2, (high - low) / 2


def _basis(basis: int | None, dim: int) -> int:
    count = BASIS[dim - 1] if basis is None else basis
    if isinstance(count, bool) or not isinstance(count, int) or count < 1 or count**dim > MOST_WEIGHTS:
        raise ValueError(
            f"latent_gp: expected basis as a whole number ≥ 1, with at most {MOST_WEIGHTS} basis functions in all "
            f"({dim} inputs), got {basis!r}"
        )
    return count


class Function(nn.Module):
    """f `(T, N)` from φ `(T, 1, 3 + weights)` and x `(T, N, dim)`.

    Attributes:
        weights: How many basis functions there are in all.
    """

    frequencies: Tensor
    centre: Tensor
    reach: Tensor

    def __init__(self, kernel: str, centre: Tensor, half: Tensor, basis: int) -> None:
        super().__init__()
        self.kernel, self.dim = kernel, len(centre)
        one = torch.arange(1, basis + 1, dtype=torch.float64) * math.pi / (2 * EDGE)
        self.register_buffer("frequencies", torch.cartesian_prod(*[one] * self.dim).reshape(-1, self.dim))
        self.register_buffer("centre", centre)
        self.register_buffer("reach", half)
        self.weights = basis**self.dim

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """The functions of the tasks at their rows."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"latent_gp: expected inputs of shape (tasks, rows, {self.dim}), as in the tasks that the model was "
                f"built from, got {tuple(x.shape)}"
            )
        log_length, log_scale, mean = phi[..., :OWN].unbind(-1)
        root = (log_scale.unsqueeze(-1) + 0.5 * self._log_density(log_length)).exp()
        return mean + (root * phi[..., OWN:] * self._basis(x)).sum(-1)

    def _basis(self, x: Tensor) -> Tensor:
        """Eigenfunctions `(T, N, weights)`."""
        inside = ((x - self.centre) / self.reach).clamp(-0.9 * EDGE, 0.9 * EDGE).unsqueeze(-2) + EDGE
        return (torch.sin(self.frequencies.to(x.dtype) * inside) / EDGE**0.5).prod(-1)

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
