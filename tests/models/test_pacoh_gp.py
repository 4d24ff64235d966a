"""PACOH-GP against the Gaussian process written out: evidence, the posterior of the level, and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lines import lines
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.models import pacoh_gp


def process(shared: dict[str, Any], model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a function and its level at x `(N, 1)`, without noise, in standard units of the labels."""
    function = model.predictor
    values = {name: torch.as_tensor(np.asarray(value)) for name, value in shared.items()}
    with torch.no_grad():
        f = function(torch.zeros(1, 1, 1).double(), x[None].double(), values)[0]
    h = f[:, 1:]
    squares = (h[:, None] - h[None]).square().sum(-1)
    return f[:, 0], values["scale"] ** 2 * torch.exp(-squares / 2) + values["tau"] ** 2


def test_the_level_has_its_exact_posterior_and_new_rows_those_of_the_process() -> None:
    tasks = lines(12, 0)
    model = pacoh_gp.build(tasks, hidden=(3,), features=2)
    fit = bm.fit(model, tasks, method=pacoh_gp.method(optimizer=bm.Optimizer(steps=60)), progress=False)
    names = ("mean_weights", "feature_weights", "log_scales", "sigma", "scale", "tau")
    shared = {name: fit.shared.mean(name) for name in names}
    new, target = lines(4, 1).context_target(context=4, seed=0)
    post = fit.posterior(new, draws=1000)
    mean = post.predict(target, kind="mean").mean
    reader: Any = model.predictor.reader
    loc, unit = float(reader.y_loc), float(reader.y_scale)
    noise, tau2 = float(shared["sigma"]) ** 2, float(shared["tau"]) ** 2
    for i, (old, rows) in enumerate(zip(new, target, strict=True)):
        m, k = process(shared, model, torch.cat([old.x, rows.x]))
        y = (old.y.double() - loc) / unit
        inverse = torch.linalg.inv(k[:4, :4] + noise * torch.eye(4, dtype=torch.float64))
        level = tau2 * inverse.sum(0) @ (y - m[:4])
        sd = float((tau2 - tau2**2 * inverse.sum()).sqrt())
        assert abs(post.mean("phi")[i, 0] - float(level)) < 4 * sd / np.sqrt(1000 * post.ess[i])
        assert abs(post.sd("phi")[i, 0] / sd - 1) < 4 / np.sqrt(2 * 1000 * post.ess[i])
        expected = loc + unit * (m[4:] + k[4:, :4] @ inverse @ (y - m[:4]))
        np.testing.assert_allclose(mean[i], expected.numpy(), atol=4 * unit * sd / np.sqrt(1000 * post.ess[i]))
    assert (post.flag == "").all() and (post.ess > 0.3).all()


@pytest.mark.parametrize("features", [None, 2])
def test_the_likelihood_is_that_of_all_labels_together(features: int | None) -> None:
    tasks = lines(3, 0)
    model: Any = pacoh_gp.build(tasks, hidden=(3,), features=features)
    assert len(model.predictor.hyper_priors(0.3, 0)) == (5 if features is None else 6)
    density = TaskDensity(model, tasks)
    theta = density.prior_scale()[0]
    noise = torch.tensor([[0.5], [-1.0], [0.0]], dtype=torch.float64)
    found = density.log_task(theta, noise, density.tensors(tasks.batch(slice(None))), dict(density.learned.values))
    shared = {name: value.numpy() for name, value in density.shared_values(theta).items()}
    loc, unit = float(model.predictor.reader.y_loc), float(model.predictor.reader.y_scale)
    for i, task in enumerate(tasks):
        m, k = process(shared, model, task.x)
        k = k - float(shared["tau"]) ** 2 + (float(shared["sigma"]) ** 2 + 1e-8) * torch.eye(6, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(loc + unit * (m + float(shared["tau"]) * noise[i]), unit**2 * k)
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(noise[i, 0])
        assert float(found[i]) == pytest.approx(float(normal.log_prob(task.y.double()) + prior), abs=1e-6)


def test_several_labels_are_refused() -> None:
    tasks = bm.Tasks.from_arrays([np.zeros((3, 1))] * 2, [np.zeros((3, 2))] * 2)
    with pytest.raises(ValueError, match=r"pacoh_gp: expected one label a row, got labels of shape \(2,\)"):
        pacoh_gp.build(tasks)
