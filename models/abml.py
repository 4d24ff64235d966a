"""Amortized Bayesian meta-learning (ABML): a task's weights by a few steps of variational inference from the prior.

    φ_i ~ N(μ, diag(τ²)),   q(φ | D, θ) = N(m_K, diag(s_K²)) after K steps on the task's own bound, from (μ, τ),
    max_θ log p(θ) + Σ_i E_q [log p(D_i | φ)] − KL(q(φ | D_i, θ) | p(φ | θ)).

The steps are `bm.guides.Variational`, differentiated through; θ = (μ, τ) is a point. Nothing is stored a task.

Deviations from the paper: natural gradients with learned sizes instead of plain ones; the bound is that of the rows the
steps have seen, by the posterior's definition, where the paper adds further rows of the task; τ has a log-normal
hyper-prior instead of a gamma one of 1/τ², μ lies around first weights instead of 0.

References:
    Ravi, Beatson: Amortized Bayesian Meta-Learning, 2019, https://openreview.net/forum?id=rkgpy3C5tX
"""

from __future__ import annotations

import bayesmeta as bm
from bayesmeta.models.bayesian_network import build as build


def method(
    *, steps: int = 5, draws: int = 8, shared: str = "map", optimizer: bm.Optimizer | None = None
) -> bm.Amortized:
    """How it is fitted: `bm.fit(model, tasks, method=abml.method())`.

    Args:
        steps: K.
        draws: Points at which a step sees the task's log joint.
        shared: Posterior of θ: "map" as in the paper, or "svgd", particles.
        optimizer: Steps, batch size and learning rate.
    """
    guide = bm.guides.Variational(steps=steps, draws=draws)
    return bm.Amortized(shared=shared, guide=guide, optimizer=optimizer or bm.Optimizer())
