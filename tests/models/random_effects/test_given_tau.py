"""The closed form given tau against matrices, and mixtures of normals against themselves."""

from __future__ import annotations

import numpy as np
import pytest
from meta_reference import Reference, cases
from scipy import stats

from bayesmeta.models.random_effects.given_tau import NormalMixture, RandomEffects


@pytest.mark.parametrize("name", ["regression, slopes normal", "more coefficients than studies", "units of 1000"])
def test_coefficients_and_studies_given_tau(name: str) -> None:
    case = cases()[name]
    reference = Reference(case)
    given = [case.mu_prior] + [case.slope_prior] * (reference.x.shape[1] - 1)
    prior = np.array([(0.0, np.inf) if one is None else one for one in given])
    model = RandomEffects(case.effects, case.errors, reference.x, prior)
    taus = np.array([1e-6, 0.3, 5.0]) * case.errors.mean()
    mean, root = model.coefficients(taus)
    phi, variance = model.studies(taus)
    likely = model.log_likelihood(taus)
    for i, tau in enumerate(taus):
        beta, cover, centre, spread = reference.given(float(tau))
        np.testing.assert_allclose(mean[i], beta, rtol=1e-8)
        np.testing.assert_allclose(root[i] @ root[i].T, cover, rtol=1e-7, atol=1e-12 * cover.max())
        np.testing.assert_allclose(phi[i], centre, rtol=1e-8)
        np.testing.assert_allclose(variance[i], spread, rtol=1e-6)
        assert likely[i] == pytest.approx(reference.log_likelihood(float(tau)) + reference.shift, abs=1e-8)


def test_a_mixture_of_normals() -> None:
    weight, none = np.array([0.3, 0.7]), np.zeros(2, dtype=bool)
    loc, sd = np.array([[-4.0, 0.0], [3.0, 1e3]]), np.array([[0.5, 1.0], [2.0, 1e-3]])
    found = NormalMixture(weight, none, loc, sd**2)
    q = [1e-6, 0.29, 0.31, 0.999]
    x = found.quantile(q)
    assert x.shape == (4, 2)
    for j in range(2):
        np.testing.assert_allclose(stats.norm.cdf(x[:, [j]], loc[:, j], sd[:, j]) @ weight, q, rtol=1e-9)
        np.testing.assert_allclose(np.diagonal(found.cdf(x[:, j])[:, [j] * 4]), q, rtol=1e-9)
    np.testing.assert_allclose(found.mean, weight @ loc)
    np.testing.assert_allclose(found.sd**2, weight @ (sd**2 + loc**2) - (weight @ loc) ** 2, rtol=1e-9)
    density = stats.norm.pdf(np.array([1.0])[:, None, None], loc, sd).transpose(0, 2, 1) @ weight
    np.testing.assert_allclose(found.pdf([1.0]), density, rtol=1e-12)
