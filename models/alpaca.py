"""ALPaCA: Bayesian linear regression on features that all tasks share; a task's posterior is exact.

    y = φ_iᵀ h(x) + σ ε,   φ_i ~ N(μ, S) (k outputs: k such columns)

Inference of φ: in closed form, `method == "exact"`: Λ = S⁻¹ + Hᵀ H / σ², mean Λ⁻¹ (S⁻¹ μ + Hᵀ y / σ²).
Objective: the evidence of whole tasks, log p(y) = Σ_j log p(y_j | y_1 … y_j−1): each row given contexts of every size.
`bm.Marginal(shared="map")` climbs it with all tasks at once, `bm.Amortized(shared="map", guide=bm.guides.Exact())` with
a batch of tasks a step, for very many, and for few: it stops on held-out tasks where weights outnumber labels.

Deviations: the paper scores held-out rows given contexts of random sizes, each row alone; its σ is fixed and S in units
of σ², here both are learned; S is diagonal unless cov="full". Other likelihoods than normal ones are welcome, and then
the posterior is no longer exact.

References:
    Harrison, Sharma, Pavone: Meta-Learning Priors for Efficient Online Bayesian Regression, 2018,
    https://arxiv.org/abs/1807.08912
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import bayesmeta as bm


def build(
    network: nn.Module | None = None,
    *,
    dim: int = 1,
    features: int = 16,
    outputs: int = 1,
    hidden: Sequence[int] = (64, 64),
    cov: Literal["diag", "full"] = "diag",
    likelihood: Any = None,
    seed: int = 0,
) -> bm.HierarchicalModel:
    """A Bayesian last layer, to be fitted by `bm.fit(model, tasks, method=bm.Marginal(shared="map"))`.

    Args:
        network: Module h `(T, N, *dx) -> (T, N, features)`; None for a perceptron with tanh.
        dim: Numbers of an input, for that perceptron.
        features: Numbers that h gives for a row.
        outputs: Numbers that the likelihood takes for a row.
        hidden: Numbers in each of its hidden layers.
        cov: "diag", or "full" to learn correlations between the numbers of φ.
        likelihood: One of `bm.likelihoods`, or a function of `(f, batch, shared)`; None is
            `Normal(prior_scale=1.0)`, for labels of order one.
        seed: Of the first weights of the perceptron.

    Returns:
        A model with the task site `phi` `(features · outputs,)`, shared sites `mu`, `tau`, with cov="full" `corr`, and
        those of the likelihood. Weights of h are point estimates.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> import bayesmeta as bm
        >>> bm.models.alpaca.build(features=8)
        HierarchicalModel(phi: Gaussian, y: Normal, shared: mu, tau, sigma)
    """
    _check_sizes({"dim": [dim], "features": [features], "outputs": [outputs], "hidden": hidden})
    if not isinstance(network, nn.Module | None):
        raise ValueError(f"alpaca: expected network as a module (T, N, *dx) -> (T, N, features), got {network!r}")
    h = _perceptron([dim, *hidden, features], seed) if network is None else network
    observed = bm.likelihoods.Normal(prior_scale=1.0) if likelihood is None else likelihood
    prior = bm.priors.Gaussian(features * outputs, cov=cov, loc_scale=1.0, sd_scale=1.0)
    return bm.HierarchicalModel(prior, LastLayer(h, features, outputs), observed)


def _check_sizes(sizes: Mapping[str, Sequence[int]]) -> None:
    for name, values in sizes.items():
        for value in values if isinstance(values, Sequence) else [None]:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"alpaca: expected {name} as whole numbers ≥ 1, got {values!r}")


class LastLayer(nn.Module):
    """F = φᵀ h(x): `(T, N)`, or `(T, N, outputs)` where there are several."""

    def __init__(self, network: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.network, self.features, self.outputs = network, features, outputs

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """For φ `(T, 1, features · outputs)` and x `(T, N, *dx)`."""
        h = self.network(x)
        if h.shape != (*x.shape[:2], self.features):
            raise ValueError(
                f"alpaca: expected a network that gives {(*x.shape[:2], self.features)} for x of shape "
                f"{tuple(x.shape)}, got {tuple(h.shape)}; say features={h.shape[-1]}"
            )
        if self.outputs == 1:
            return (phi * h).sum(-1)
        return (phi.unflatten(-1, (self.outputs, self.features)) * h.unsqueeze(-2)).sum(-1)


def _perceptron(sizes: list[int], seed: int) -> nn.Sequential:
    """Layers with tanh between."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width_in, width_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
