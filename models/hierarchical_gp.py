"""Hierarchical Gaussian process: the kernel of each task is its own, and its hyper-parameters follow a learned prior.

    φ_i = (log l_i, [log p_i], log s_i) ~ N(μ, diag τ²),   f_i ~ GP(m(x), s_i² k(h(x), h(x'); l_i, p_i)),
    y = f_i(x) + σ ε

A point of φ is a Gaussian process of its own; its posterior, and with it every prediction, is a mixture of these.

Inference of φ: weighted draws around the modes of log p(D_i | φ) p(φ | θ), the function f_i integrated out exactly.
Objective: the evidence of the tasks, `bm.Marginal(shared="map")`, with φ integrated out by quadrature (up to three
hyper-parameters). Deep-kernel transfer is the case τ = 0 with a learned h: φ is then the same for all tasks, and the
evidence closed.

Deviations: hyper-parameters of deep-kernel transfer have a weak prior, and all tasks take part in every step.

References:
    Patacchiola, Turner, Crowley, O'Boyle, Storkey: Bayesian Meta-Learning for the Few-Shot Setting via Deep Kernels,
    2020, https://arxiv.org/abs/1910.05199
    Schwaighofer, Tresp, Yu: Learning Gaussian Process Kernels via Hierarchical Bayes, 2004,
    https://papers.nips.cc/paper/2595
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.sharing import Block, Blocks, Gaussian

KERNELS = bm.families.KERNELS
PERIODIC = ("periodic", "weakly_periodic")
JITTER = 1e-9
"""Added to the correlations' diagonal: rows that nearly coincide have a Cholesky factor whatever the noise."""
LOC_SCALE, SD_SCALE = 2.0, 1.0
"""Of the priors of μ and τ: hyper-parameters between 1/50 and 50, a factor of 10 between tasks at most."""


def build(
    kernel: str = "rbf",
    *,
    dim: int = 1,
    hyper: Literal["task", "shared"] = "task",
    mean: nn.Module | None = None,
    features: nn.Module | None = None,
    noise: float = 0.1,
) -> bm.HierarchicalModel:
    """A hierarchical Gaussian process, to be fitted by `bm.fit(model, tasks, method=bm.Marginal(shared="map"))`.

    Args:
        kernel: "rbf", "matern52", "periodic" or "weakly_periodic".
        dim: Numbers of an input, or of its features. "rbf" and "matern52" have a length for each.
        hyper: "task": each task has hyper-parameters of its own; "shared": all have the same (deep-kernel transfer).
        mean: Module `(T, N, *dx) -> (T, N)`, the mean of all tasks; None for 0.
        features: Module h `(T, N, *dx) -> (T, N, dim)` of all tasks; None for x itself.
        noise: About how large σ is, in the units of y: the median of its log-normal prior, whose sd is a factor of e.

    Returns:
        A model with the task site `phi`, blocks "log_length" `(L,)`, for periodic kernels "log_period" `()`, and
        "log_scale" `()`; shared sites `mu`, `tau` and `sigma`. Weights of mean and features are point estimates.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> import bayesmeta as bm
        >>> bm.models.hierarchical_gp.build("matern52").predictor.blocks.d
        2
    """
    _check(kernel, hyper, dim, noise)
    for name, module in (("mean", mean), ("features", features)):
        if not isinstance(module, nn.Module | None):
            raise ValueError(f"hierarchical_gp: expected {name} as a module or None, got {module!r}")
    covariance = Covariance(kernel, dim, mean, features)
    scale = 0.0 if hyper == "shared" else None
    prior = Gaussian(scale=scale, by="coordinate", loc_scale=LOC_SCALE, sd_scale=SD_SCALE).over(covariance.blocks)
    return bm.HierarchicalModel(prior, covariance, labels, shared={"sigma": dist.LogNormal(math.log(noise), 1.0)})


def _check(kernel: str, hyper: str, dim: int, noise: float) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"hierarchical_gp: expected kernel as one of {sorted(KERNELS)}, got {kernel!r}")
    if hyper not in ("task", "shared"):
        raise ValueError(f'hierarchical_gp: expected hyper="task" or hyper="shared", got {hyper!r}')
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"hierarchical_gp: expected dim, the numbers of an input, as a whole number ≥ 1, got {dim!r}")
    if not 0 < noise < math.inf:
        raise ValueError(f"hierarchical_gp: expected noise as a positive number in the units of y, got {noise!r}")


class Covariance(nn.Module):
    """Covariances of the function at the rows of each task, with its means as a last column.

    Attributes:
        blocks: The blocks of φ.
    """

    def __init__(self, kernel: str, dim: int, mean: nn.Module | None, features: nn.Module | None) -> None:
        super().__init__()
        self.kernel, self.dim, self.mean = kernel, dim, mean
        self.features = nn.Identity() if features is None else features
        periodic = kernel in PERIODIC
        period = (Block("log_period", ()),) if periodic else ()
        self.blocks = Blocks((Block("log_length", (1 if periodic else dim,)), *period, Block("log_scale", ())))

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """`(T, N, N + 1)` for φ `(T, 1, d)` and x `(T, N, *dx)`."""
        own = {name: part.exp() for name, part in self.blocks.split(phi).items()}
        h = self.features(x)
        if h.dim() != 3 or h.shape[-1] != self.dim:
            raise ValueError(
                f"hierarchical_gp: expected inputs, or their features, of shape (tasks, rows, {self.dim}), got "
                f"{tuple(h.shape)}; say dim={h.shape[-1]}"
            )
        correlation = self._correlation(own, h.unsqueeze(-2) - h.unsqueeze(-3))
        eye = torch.eye(h.shape[1], dtype=h.dtype)
        covariance = own["log_scale"].square().unsqueeze(-1) * (correlation + JITTER * eye)
        mean = h.new_zeros(h.shape[:2]) if self.mean is None else self.mean(x).reshape(h.shape[:2])
        return torch.cat([covariance, mean.unsqueeze(-1)], -1)

    def _correlation(self, own: Mapping[str, Tensor], difference: Tensor) -> Tensor:
        length = own["log_length"].unsqueeze(-2)
        if "log_period" in own:
            return KERNELS[self.kernel](difference, length[..., 0], own["log_period"].unsqueeze(-1))
        one = torch.ones((), dtype=difference.dtype)
        return KERNELS[self.kernel](difference / length, one, one)


def labels(f: Tensor, batch: bm.Batch, shared: Mapping[str, Tensor]) -> Distribution:
    """The labels of a task together, f integrated out: N(m, K + σ² I), batch shape `(T, 1)`."""
    noise = shared["sigma"].square() * torch.eye(f.shape[1], dtype=f.dtype)
    return dist.MultivariateNormal(f[..., -1].unsqueeze(1), f[..., :-1].unsqueeze(1) + noise)
