from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, truncnorm

from bayesmeta.data.families import Cauchy
from bayesmeta.data.families.cauchy import mean


def test_the_mean_by_hand() -> None:
    at = torch.tensor([[-1.0, -1.0], [2.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(
        mean(at),
        torch.tensor([6 / math.pi + 3 / (19 * math.pi) + 1, 6 / (19 * math.pi) + 3 / math.pi + 1], dtype=torch.float64),
    )


def test_inputs_are_cut_normal_and_labels_noisy() -> None:
    tasks, truth = Cauchy().simulate(100, rows=20)
    x = tasks.x.numpy().ravel()
    cut = truncnorm(-3, 2, scale=2.5)
    assert -7.5 <= x.min() and x.max() <= 5
    assert abs(x.mean() - cut.mean()) < 4 * cut.std() / math.sqrt(len(x))
    assert abs((x**2).mean() - cut.moment(2)) < 4 * math.sqrt((cut.moment(4) - cut.moment(2) ** 2) / len(x))
    z = (tasks.y.numpy() - truth["function"].ravel()) / 0.05
    assert abs((z**2).mean() - 1) < 4 * math.sqrt(2 / len(z))


def test_the_evidence_is_that_of_a_normal_distribution() -> None:
    family = Cauchy()
    tasks, _ = family.simulate(3, rows=[1, 6, 15])
    for task, got in zip(tasks, family.log_evidence(tasks.batch(slice(None))), strict=True):
        squared = (task.x[:, None] - task.x).square().sum(-1).numpy()
        covariance = 0.04 * np.exp(-squared) + 0.0025 * np.eye(len(squared))
        expected = multivariate_normal.logpdf(task.y.numpy(), mean(task.x).numpy(), covariance)
        assert float(got) == pytest.approx(expected)


def test_the_error_of_the_oracle_that_is_known() -> None:
    """RMSE .1715 ± .0013, and .2062 without a context, over 200 tasks of other seeds."""
    family = Cauchy(target_rows=100)
    context, target = (tasks.batch(slice(None)) for tasks in family.episodes(200))
    for given, known in ((context, 0.1715), (context.replace(none(context.tensors)), 0.2062)):
        rmse = (family.oracle(given, target.x).mean - target.y).square().mean(1).sqrt()
        assert abs(float(rmse.mean()) - known) < 4 * math.hypot(0.0013, float(rmse.std()) / math.sqrt(200))


def none(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"mask": torch.zeros_like(tensors["mask"])}


def test_constants_are_checked() -> None:
    with pytest.raises(ValueError, match="Cauchy: expected length as a positive number"):
        Cauchy(length=0.0)
