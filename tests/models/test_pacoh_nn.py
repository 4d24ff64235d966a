"""PACOH-NN: the PAC-Bayesian objective with any guide, and a hyper-prior that holds θ where tasks are few."""

from __future__ import annotations

import math

import numpy as np
from lines import lines

import bayesmeta as bm
from bayesmeta.models import pacoh_nn


def test_it_is_the_hyper_posterior_of_the_weights_prior() -> None:
    method = pacoh_nn.method(shared="svgd", lam=3.0)
    assert (method.shared, method.objective) == ("svgd", bm.PACBayes(3.0))
    assert isinstance(method.guide, bm.guides.Variational)
    assert pacoh_nn.method().objective == bm.PACBayes(math.inf)
    assert isinstance(pacoh_nn.method(guide=bm.guides.DiagonalSVGD()).guide, bm.guides.DiagonalSVGD)


def test_a_small_lambda_keeps_theta_at_its_hyper_prior() -> None:
    tasks, moved = lines(8, 0), []
    for lam in (1e-6, math.inf):
        model = pacoh_nn.build(tasks, hidden=(3,))
        guide = bm.guides.Variational(steps=1, draws=2)
        options = pacoh_nn.method(lam=lam, guide=guide, optimizer=bm.Optimizer(steps=40, lr=2e-2))
        fit = bm.fit(model, tasks, method=options, progress=False)
        moved.append(np.abs(fit.shared.mean("mu") - model.prior.first.numpy()).max())
    assert moved[0] < 0.01 < 0.05 < moved[1]


def test_particles_of_theta_are_drawn_with_the_weights() -> None:
    tasks = lines(6, 0)
    guide = bm.guides.Variational(steps=1, draws=2)
    options = pacoh_nn.method(shared="svgd", guide=guide, optimizer=bm.Optimizer(steps=5))
    fit = bm.fit(pacoh_nn.build(tasks, hidden=(2,)), tasks, method=options, progress=False)
    post = fit.posterior(lines(2, 1), draws=100, refine="none")
    assert post.draws("phi").shape == (100, 2, 7) and len(np.unique(fit.shared.draws("mu")[:, 0])) > 100
    assert fit.shared.status in ("corrected", "uncorrected")
