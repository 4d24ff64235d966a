"""PACOH with networks: the prior of all weights of a network, learned with a hyper-prior from few tasks.

    φ_i ~ N(μ, diag(τ²)),   log Q*(θ) = log p(θ) + λ / (n β + λ) Σ_i ln Z(D_i, θ),   θ = (μ, τ),
    Z(D_i, θ) = ∫ p(D_i | φ, θ) p(φ | θ) dφ,

the model that of `bayesian_network`. Q*, the objective `bm.PACBayes`, is found as a point (`shared="map"`), by
particles (`"svgd"`) or as a normal (`"normal"`); ln Z is estimated from weighted draws of a Gaussian that is adapted to
the task, `bm.guides.Variational`, and this is the posterior of a new task's weights.

Deviations from the paper: there ln Z is estimated with draws of the prior and tempered, β = √m, and new tasks run SVGD
from draws of the prior: for that give `guide=bm.guides.DiagonalSVGD(…)`. New tasks weigh particles of θ by their own
evidence.

References:
    Rothfuss, Fortuin, Josifoski, Krause: PACOH: Bayes-Optimal Meta-Learning with PAC-Guarantees, 2021,
    https://arxiv.org/abs/2002.05551
"""

from __future__ import annotations

import math

import bayesmeta as bm
from bayesmeta.models.bayesian_network import build as build


def method(
    *,
    shared: str = "map",
    lam: float | None = math.inf,
    guide: bm.TaskGuide | None = None,
    optimizer: bm.Optimizer | None = None,
) -> bm.Amortized:
    """How it is fitted: `bm.fit(model, tasks, method=pacoh_nn.method())`.

    Args:
        shared: The hyper-posterior: "map", "svgd" (particles) or "normal".
        lam: λ of `bm.PACBayes`. ∞, the evidence in full, is near the published experiments, which weigh the log
            hyper-prior by 1e-3 or less; None, λ = n, lets it outweigh few tasks.
        guide: Of the weights; None: `bm.guides.Variational()`.
        optimizer: Steps, batch size and learning rate.
    """
    guide = bm.guides.Variational() if guide is None else guide
    return bm.Amortized(shared=shared, objective=bm.PACBayes(lam), guide=guide, optimizer=optimizer or bm.Optimizer())
