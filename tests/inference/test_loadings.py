"""Matrices that depend on θ."""

from __future__ import annotations

import torch

from bayesmeta.inference.loadings import THETA_BOUND, Loadings, ThetaStandardiser


def test_theta_is_standardised_and_bounded() -> None:
    standardise = ThetaStandardiser(2)
    standardise.follow(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))
    near = standardise(torch.tensor([[1.05, -2.4]], dtype=torch.float64))
    torch.testing.assert_close(near, torch.tensor([[0.1, -0.1]]), rtol=1e-3, atol=0)
    assert standardise(torch.full((1, 2), 1e6, dtype=torch.float64)).abs().max() <= THETA_BOUND


def test_loadings_start_constant_and_can_follow_theta() -> None:
    loadings, theta = Loadings(2, 3, 4, hidden=8, initial_sd=0.3), torch.randn(5, 2)
    torch.testing.assert_close(loadings(theta), loadings.constant.expand(5, 3, 4))
    with torch.no_grad():
        loadings.net[-1].weight.fill_(0.1)
    assert not torch.allclose(loadings(theta)[0], loadings(theta)[1])
    assert Loadings(0, 3, 4, hidden=8, initial_sd=0.3)(theta[:, :0]).shape == (5, 3, 4)
