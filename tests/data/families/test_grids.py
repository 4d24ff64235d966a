from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from bayesmeta.data.families.grids import cells, refined


def test_cells_are_middles_and_widths() -> None:
    middle, width = cells(torch.tensor([[0.0, 1.0, 4.0]]))
    assert middle.tolist() == [[0.5, 2.5]] and width.tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("sd", [3.0, 0.1, 1e-3, 1e-6])
def test_cells_resolve_a_peak_much_narrower_than_they_were(sd: float) -> None:
    loc = torch.tensor([[0.123456], [0.9876], [0.5]], dtype=torch.float64)
    edges = torch.linspace(0, 1, 65, dtype=torch.float64).repeat(3, 1)
    peak = Normal(loc, sd)
    for _ in range(5):
        middle, width = cells(edges)
        edges = refined(edges, peak.log_prob(middle) + width.log())
    assert bool((edges.diff(dim=1) > 0).all()) and bool((edges[:, 0] == 0).all()) and bool((edges[:, -1] == 1).all())
    middle, width = cells(edges)
    mass = (peak.log_prob(middle) + width.log()).logsumexp(-1).exp()
    expected = (peak.cdf(torch.ones(1)) - peak.cdf(torch.zeros(1))).squeeze(-1)
    torch.testing.assert_close(mass, expected, rtol=2e-3, atol=0)


def test_two_peaks_both_get_cells() -> None:
    edges = torch.linspace(0, 1, 129, dtype=torch.float64).unsqueeze(0)

    def log_density(u: torch.Tensor) -> torch.Tensor:
        small = Normal(0.8, 0.005).log_prob(u) + math.log(0.01)
        return torch.logaddexp(Normal(0.3, 0.001).log_prob(u) + math.log(0.99), small)

    for _ in range(3):
        middle, width = cells(edges)
        edges = refined(edges, log_density(middle) + width.log())
    middle, width = cells(edges)
    weight = (log_density(middle) + width.log()).exp()
    assert float(weight.sum()) == pytest.approx(1, abs=2e-3)
    assert float(weight[middle > 0.55].sum()) == pytest.approx(0.01, rel=0.01)
