"""Bayesian model-agnostic meta-learning (BMAML): particles of a task's weights, moved by Stein variational steps.

    φ_i ~ N(μ, diag(τ²)),   q(φ | D, θ) = Σ_p N(φ_p, s²) / P, φ_p after K steps of SVGD on log p(φ, D | θ),
    max_θ Σ_i log E_{q(φ | C, θ)} p(T | φ),

C and T a random context and target of the task. The particles are `bm.guides.DiagonalSVGD`, started at learned points
and differentiated through; the objective is the log density of the target, "predictive".

Deviations from the paper: the target's log density instead of the chaser loss, the distance of particles after K steps
on C to those after more steps on C ∪ T, which learned step sizes, as here, would make 0 by standing still; particles
are narrow Gaussians, so that φ has a density; noise and precision of the prior are shared, not particles of their own.

References:
    Yoon, Kim, Dia, Kim, Bengio, Ahn: Bayesian Model-Agnostic Meta-Learning, 2018, https://arxiv.org/abs/1806.03836
"""

from __future__ import annotations

import bayesmeta as bm
from bayesmeta.models.bayesian_network import build as build


def method(
    *,
    particles: int = 5,
    steps: int = 5,
    context: tuple[int, int] | None = None,
    optimizer: bm.Optimizer | None = None,
) -> bm.Amortized:
    """How it is fitted: `bm.fit(model, tasks, method=bmaml.method())`.

    Args:
        particles: P.
        steps: K.
        context: Smallest and largest training context; None: (0, 10).
        optimizer: Steps, batch size and learning rate.
    """
    return bm.Amortized(
        shared="map",
        objective="predictive",
        context=context,
        guide=bm.guides.DiagonalSVGD(particles=particles, steps=steps),
        optimizer=optimizer or bm.Optimizer(),
    )
