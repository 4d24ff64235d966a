from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from bayesmeta.data.families.regression import condition, predict
from bayesmeta.data.families.rows import Rows

X = torch.tensor([[0.0, 0.4, 1.0, 9.0], [0.3, 2.0, 2.2, 3.0]], dtype=torch.float64).unsqueeze(-1)
Y = torch.tensor([[1.0, 0.5, -0.3, 0.0], [0.2, 1.0, 0.9, -1.0]], dtype=torch.float64)
ROWS = Rows(X, Y, torch.tensor([[True, True, True, False], [True] * 4]))
NEW = torch.tensor([[[0.2], [5.0]], [[2.1], [2.0]]], dtype=torch.float64)
SCALES = torch.tensor([1.0, 2.0], dtype=torch.float64)


def covariance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    correlation = torch.exp(-0.5 * (first - second.mT).square())
    return correlation.unsqueeze(1) * SCALES.square()[:, None, None]


def test_against_the_normal_distribution_of_all_rows() -> None:
    evidence, lower, white = condition(covariance(X, X), Y, ROWS, 0.3)
    loc, sd = predict(covariance(X, NEW), SCALES.square().unsqueeze(-1), (lower, white), ROWS, 0.3)
    for task, n in enumerate((3, 4)):
        for k in range(2):
            x = torch.cat([X[task, :n], NEW[task]])
            whole = covariance(x[None], x[None])[0, k].numpy() + 0.09 * np.eye(n + 2)
            y = Y[task, :n].numpy()
            assert float(evidence[task, k]) == pytest.approx(multivariate_normal.logpdf(y, cov=whole[:n, :n]))
            gain = np.linalg.solve(whole[:n, :n], whole[:n, n:]).T
            np.testing.assert_allclose(loc[task, :, k], gain @ y)
            np.testing.assert_allclose(sd[task, :, k] ** 2, np.diag(whole[n:, n:] - gain @ whole[:n, n:]))


def test_noise_that_is_too_small_is_an_error() -> None:
    same = Rows(torch.zeros_like(X), Y, ROWS.mask)
    with pytest.raises(ValueError, match="the noise 1e-12 is too small"):
        condition(covariance(same.x, same.x), Y, same, 1e-12)
