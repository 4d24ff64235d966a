"""The quadrature over tau where the answer is known: a likelihood that says nothing leaves the prior."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
from scipy import stats

from bayesmeta.models.random_effects.tau_posterior import TauPosterior, integrate
from bayesmeta.models.random_effects.tau_prior import TauPrior

Q = np.array([1e-6, 0.025, 0.5, 0.99])


def silent(tau: np.ndarray) -> np.ndarray:
    return np.zeros(tau.shape)


@pytest.mark.parametrize(
    ("prior", "known"),
    [
        (dist.LogNormal(0.5, 1e-4), stats.lognorm(float(np.float32(1e-4)), 0, math.exp(0.5))),
        (lambda tau: stats.lognorm(0.01, 0, 3.0).logpdf(tau), stats.lognorm(0.01, 0, 3.0)),
        (lambda tau: np.where((tau > 0.3) & (tau < 1.3), 0.0, -np.inf), stats.uniform(0.3, 1.0)),
        (dist.Gamma(0.25, 2.0), stats.gamma(0.25, 0, 0.5)),
        (dist.HalfNormal(1e-5), stats.halfnorm(0, float(np.float32(1e-5)))),
        (dist.Uniform(0.5, 2.0), stats.uniform(0.5, 1.5)),
    ],
)
def test_without_information_the_prior_comes_back(prior: object, known: stats.rv_continuous) -> None:
    found = TauPosterior(silent, TauPrior(prior), scales=(0.1, 2.0))
    assert found.log_evidence == pytest.approx(0.0, abs=1e-6)
    assert found.mean == pytest.approx(known.mean(), abs=1e-6 * known.std())
    assert found.sd == pytest.approx(known.std(), rel=1e-6)
    np.testing.assert_allclose(found.quantile(Q), known.ppf(Q), atol=1e-6 * known.std(), rtol=0)
    np.testing.assert_allclose(found.cdf(known.ppf(Q)), Q, atol=1e-6)
    np.testing.assert_array_equal(found.pdf([-1.0, 1e9]), 0.0)


def test_a_rough_density_is_refused_not_approximated() -> None:
    rough = np.random.default_rng(0)
    with pytest.raises(ValueError, match="does not converge near tau = .*smooth inside its support"):
        integrate(lambda t: rough.normal(size=t.shape), np.array([-1.0, 1.0]))
