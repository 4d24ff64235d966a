"""Probabilistic model-agnostic meta-learning (PLATIPUS): a Gaussian over weights whose mean takes gradient steps.

    φ_i ~ N(μ, diag(τ²)),   q(φ | D, θ) = N(μ + τ z_K, τ² v),   v = 1 / (1 + n w),
    z_{k+1} = z_k + r_k v ∇ log p(z_k, D | θ),
    max_θ Σ_i E_{q(φ | C ∪ T)} [log p(T | φ)] − KL(q(φ | C ∪ T, θ) | q(φ | C, θ)),

C and T a random context and target of the task. The steps are `bm.guides.Gradient`, the objective "predictive-elbo":
what is known from C is the prior of what is known from all rows.

Deviations from the paper: the mean takes all steps, where the paper's takes one and every draw some more of its own, so
that φ has a density; posterior and context-given prior share their step sizes r and variances v, which know n; KL has
the weight 1.

References:
    Finn, Xu, Levine: Probabilistic Model-Agnostic Meta-Learning, 2018, https://arxiv.org/abs/1806.02817
"""

from __future__ import annotations

import bayesmeta as bm
from bayesmeta.models.bayesian_network import build as build


def method(
    *, steps: int = 5, context: tuple[int, int] | None = None, optimizer: bm.Optimizer | None = None
) -> bm.Amortized:
    """How it is fitted: `bm.fit(model, tasks, method=platipus.method())`.

    Args:
        steps: K.
        context: Smallest and largest training context; None: (0, 10).
        optimizer: Steps, batch size and learning rate.
    """
    return bm.Amortized(
        shared="map",
        objective="predictive-elbo",
        context=context,
        guide=bm.guides.Gradient(steps=steps, curvature="diagonal"),
        optimizer=optimizer or bm.Optimizer(),
    )
