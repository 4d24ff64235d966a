"""PLATIPUS: gradient steps to a diagonal Gaussian, the bound given a context, and spread that shrinks with rows."""

from __future__ import annotations

import numpy as np
import torch
from lines import lines

import bayesmeta as bm
from bayesmeta.models import platipus


def test_it_is_the_bound_on_predictions_of_gradient_steps() -> None:
    method = platipus.method(steps=3, context=(1, 4))
    assert (method.shared, method.objective, method.context) == ("map", "predictive-elbo", (1, 4))
    assert isinstance(method.guide, bm.guides.Gradient) and method.guide.steps == 3


def test_every_row_narrows_the_gaussian_alike() -> None:
    """Its variance is that of the prior over 1 + n w; w = 1 here."""
    tasks = lines(6, 0)
    options = platipus.method(steps=2, optimizer=bm.Optimizer(steps=2))
    fit = bm.fit(platipus.build(tasks, hidden=(3,)), tasks, method=options, progress=False)
    with torch.no_grad():
        fit._guides.task.log_curvature.zero_()
    prior = fit.prior(4000).sd("phi")[0]
    for shots in (2, 5):
        context = lines(1, 1).context_target(context=shots, seed=0)[0]
        sd = fit.posterior(context, draws=4000, refine="none").sd("phi")[0]
        np.testing.assert_allclose(sd / prior, (1 + shots) ** -0.5, rtol=5 * np.sqrt(2 / (2 * 4000)))
