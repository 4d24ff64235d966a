"""Meta-analyses against quadrature by another way, closed forms, and the exact moments of the eight schools."""

from __future__ import annotations

import importlib
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from meta_reference import SCHOOLS, SHORT, Case, Q, Reference, cases
from scipy import stats

import bayesmeta as bm

BAR = 1e-6
CASES = cases()


def analysed(case: Case) -> Any:
    return bm.models.meta_analysis(case.effects, case.errors, **case.options)


def test_the_function_keeps_its_name() -> None:
    module = importlib.import_module("bayesmeta.models.meta_analysis")
    assert bm.models.meta_analysis is module.meta_analysis
    assert bm.models.MetaAnalysis is module.MetaAnalysis
    assert callable(sys.modules["bayesmeta.models"].meta_analysis)


def test_the_eight_schools_are_exact(exact: Callable[[str], tuple[Any, Any]]) -> None:
    data, moments = exact("eight_schools")
    found = bm.models.meta_analysis(data["y"], data["sigma"], tau_prior=dist.HalfCauchy(5.0), mu_prior=(0.0, 5.0))
    truth = np.array([[line["mean"], line["sd"]] for line in moments["summary"]])
    mean = [found.mu.mean, found.tau.mean, *found.phi.mean]
    sd = [found.mu.sd, found.tau.sd, *found.phi.sd]
    np.testing.assert_array_less(np.abs(mean - truth[:, 0]) / truth[:, 1], BAR)
    np.testing.assert_array_less(np.abs(sd - truth[:, 1]) / truth[:, 1], BAR)
    assert found.log_marginal_likelihood == pytest.approx(moments["meta"]["log_evidence"], abs=BAR)
    # The stored quantiles are interpolated between 800 nodes; others are checked below.
    for q, tau in moments["meta"]["tau_quantiles"].items():
        assert found.tau.quantile(float(q)) == pytest.approx(tau, abs=2e-4 * found.tau.sd)


@pytest.mark.parametrize("name", CASES)
def test_moments_quantiles_and_evidence_agree_with_another_quadrature(name: str) -> None:
    case = CASES[name]
    reference, found = Reference(case), analysed(case)
    assert found.log_marginal_likelihood == pytest.approx(reference.log_evidence, abs=BAR)
    for parameter, (mean, sd) in reference.moments().items():
        if parameter != "new" or case.covariates is None:
            assert (np.abs(found.mean(parameter) - mean) < BAR * sd).all(), parameter
            assert (np.abs(found.sd(parameter) - sd) < BAR * sd).all(), parameter
    points = {parameter: found.quantile(parameter, Q) for parameter in ("mu", "phi")}
    if case.covariates is None:
        points["new"] = found.quantile("new", Q)
    for parameter, below in reference.probabilities(points).items():
        wanted = np.reshape(Q, (-1, *(1,) * (below.ndim - 1)))
        # A probability that is off by dp moves a quantile by dp / density.
        density = np.exp(stats.norm.logpdf(stats.norm.ppf(wanted))) * np.ones_like(below)
        assert (np.abs(below - wanted) < BAR * density).all(), parameter
    for q, tau in zip(Q, found.tau.quantile(Q), strict=True):
        assert abs(reference.below(tau) - q) < BAR * found.tau.pdf(tau) * found.tau.sd
        assert found.tau.cdf(tau) == pytest.approx(q, abs=1e-12)


@pytest.mark.parametrize("tau", [0.4, 1e-7])
def test_a_prior_concentrated_at_a_point_is_known_heterogeneity(tau: float) -> None:
    ends = [torch.tensor(tau * factor, dtype=torch.float64) for factor in (1 - 1e-9, 1 + 1e-9)]
    y, s = (np.array(part) for part in SHORT)
    found = bm.models.meta_analysis(y, s, tau_prior=dist.Uniform(*ends))
    w = 1 / (s**2 + tau**2)
    mu, sd = (w @ y) / w.sum(), w.sum() ** -0.5
    own = tau**2 / (s**2 + tau**2)
    assert found.mu.mean == pytest.approx(mu, abs=1e-8 * sd)
    assert found.mu.sd == pytest.approx(sd, rel=1e-8)
    np.testing.assert_allclose(found.phi.mean, own * y + (1 - own) * mu, rtol=1e-8)
    np.testing.assert_allclose(found.phi.sd, np.sqrt(own * s**2 + (1 - own) ** 2 * sd**2), rtol=1e-8)
    np.testing.assert_allclose(found.weights, 100 * w / w.sum(), rtol=1e-8)
    np.testing.assert_allclose(found.shrinkage()["shrinkage"], 1 - own, rtol=1e-8)
    assert found.new.quantile(0.9) == pytest.approx(stats.norm.ppf(0.9, mu, math.hypot(sd, tau)), rel=1e-8)
    fixed = 1 / s**2
    typical = (len(s) - 1) * fixed.sum() / (fixed.sum() ** 2 - (fixed**2).sum())
    assert found.i2.mean == pytest.approx(tau**2 / (tau**2 + typical), rel=1e-7)


def test_the_bayes_factor_is_a_ratio_of_normal_densities() -> None:
    y, s, tau = np.array(SHORT[0]), np.array(SHORT[1]), 0.4
    ends = [torch.tensor(tau * factor, dtype=torch.float64) for factor in (1 - 1e-9, 1 + 1e-9)]
    found = bm.models.meta_analysis(y, s, tau_prior=dist.Uniform(*ends), mu_prior=(0.2, 0.7))
    logs = [stats.multivariate_normal(np.full(5, 0.2), np.diag(s**2 + t**2) + 0.49).logpdf(y) for t in (0.0, tau)]
    assert found.log_marginal_likelihood == pytest.approx(logs[1], abs=1e-7)
    assert found.bayes_factor_tau0 == pytest.approx(math.exp(logs[0] - logs[1]), rel=1e-7)
    # A flat mean is the limit of wide normal ones, up to the constant that both hypotheses share.
    flat, wide = (bm.models.meta_analysis(y, s, tau_prior=dist.HalfNormal(1.0), mu_prior=m) for m in (None, (0.0, 1e4)))
    assert flat.bayes_factor_tau0 == pytest.approx(wide.bayes_factor_tau0, rel=1e-6)
    shift = math.log(1e4 * math.sqrt(2 * math.pi))
    assert flat.log_marginal_likelihood == pytest.approx(wide.log_marginal_likelihood + shift, abs=1e-6)


def test_i2_follows_tau() -> None:
    found = analysed(CASES["flat mean"])
    share = found.i2.quantile(Q)
    np.testing.assert_allclose(found.i2.cdf(share), Q, atol=1e-12)
    grid = np.linspace(0, 1, 200_002)[1:-1]
    density = found.i2.pdf(grid)
    step, first = grid[1] - grid[0], found.i2.cdf(grid[0])
    inside = step * (density[:-1] + density[1:]) / 2
    np.testing.assert_allclose(first + np.cumsum(inside)[::20_000], found.i2.cdf(grid[1::20_000]), atol=1e-4)
    tau = found.tau
    assert found.i2.mean == pytest.approx(tau.weight @ (tau.tau**2 / (tau.tau**2 + found.i2.typical**2)), rel=1e-12)
    np.testing.assert_array_equal(found.i2.pdf([-0.1, 0.0, 1.0, 2.0]), 0.0)
    np.testing.assert_array_equal(found.i2.cdf([-0.1, 0.0, 1.0, 2.0]), [0.0, 0.0, 1.0, 1.0])


def test_i2_of_a_regression_is_that_of_its_residual_contrasts() -> None:
    case = CASES["regression, flat"]
    found = analysed(case)
    w, x = np.diag(case.errors**-2.0), np.stack([np.ones(5), case.covariates], 1)
    projection = w - w @ x @ np.linalg.inv(x.T @ w @ x) @ x.T @ w
    assert found.i2.typical**2 == pytest.approx(3 / np.trace(projection), rel=1e-12)


def test_draws_have_the_moments() -> None:
    found = analysed(CASES["flat mean"])
    count = 40_000
    drawn = found.draws(count, seed=3)
    for name in ("mu", "beta", "tau", "phi", "new"):
        mean, sd = drawn[name].mean(0), drawn[name].std(0)
        kurtosis = stats.kurtosis(drawn[name], axis=0, fisher=False)
        assert (np.abs(mean - found.mean(name)) < 4 * found.sd(name) / math.sqrt(count)).all(), name
        assert (np.abs(sd / found.sd(name) - 1) < 4 * np.sqrt((kurtosis - 1) / (4 * count))).all(), name
        below = (drawn[name] < found.quantile(name, 0.9)).mean(0)
        assert (np.abs(below - 0.9) < 4 * math.sqrt(0.09 / count)).all(), name
    # Draws are joint: given tau and mu, a study's effect is normal with a known mean.
    s2 = found.standard_errors**2
    own = drawn["tau"][:, None] ** 2 / (s2 + drawn["tau"][:, None] ** 2)
    z = (drawn["phi"] - own * found.effects - (1 - own) * drawn["mu"][:, None]) / np.sqrt(own * s2)
    assert (np.abs(z.mean(0)) < 4 / math.sqrt(count)).all()
    assert (np.abs(z.var(0) - 1) < 4 * math.sqrt(2 / count)).all()
    again = found.draws(10, seed=3)
    assert all(np.array_equal(again[name], found.draws(10, seed=3)[name]) for name in again)
    assert not np.array_equal(again["mu"], found.draws(10, seed=4)["mu"])


def test_prediction_at_covariates() -> None:
    case = CASES["regression, flat"]
    found = bm.models.meta_analysis(
        case.effects, case.errors, tau_prior=case.tau_prior, covariates={"year": case.covariates}
    )
    assert found.coefficients == ("mu", "year")
    line, study = (found.predict({"year": [0.0, 2.0]}, kind=kind) for kind in ("mean", "study"))
    np.testing.assert_allclose(line.mean, found.beta.mean[0] + np.array([0.0, 2.0]) * found.beta.mean[1], rtol=1e-10)
    assert line.sd[0] == pytest.approx(found.mu.sd, rel=1e-12)
    tau2 = found.tau.mean**2 + found.tau.sd**2
    np.testing.assert_allclose(study.sd**2, line.sd**2 + tau2, rtol=1e-10)
    np.testing.assert_allclose(found.weights.sum(), 100, rtol=1e-10)
    with pytest.raises(ValueError, match=r"new: expected the covariates \('year',\) of the new study; use predict"):
        found.new  # noqa: B018
    with pytest.raises(ValueError, match=r"covariates: expected \('year',\), got \('age',\)"):
        found.predict({"age": [1.0]})
    with pytest.raises(ValueError, match="kind: expected 'study' or 'mean', got 'both'"):
        found.predict({"year": [1.0]}, kind="both")


def test_moments_that_a_heavy_tail_leaves_out_are_not_made_up() -> None:
    two = bm.models.meta_analysis([0.8, -0.3], [0.2, 0.3], tau_prior=dist.HalfCauchy(1.0))
    assert math.isfinite(two.tau.mean)
    assert (two.tau.sd, two.mu.sd, two.new.sd) == (math.inf, math.inf, math.inf)
    assert np.isfinite([two.mu.mean, *two.phi.sd, *two.mu.quantile(Q)]).all()
    one = bm.models.meta_analysis([0.8], [0.2], tau_prior=dist.HalfCauchy(1.0))
    assert one.tau.mean == math.inf
    assert math.isnan(one.mu.mean)
    assert one.mu.quantile(0.5) == pytest.approx(0.8, abs=1e-9)
    assert (one.phi.mean[0], one.phi.sd[0]) == pytest.approx((0.8, 0.2), rel=1e-9)
    three = bm.models.meta_analysis([0.8, -0.3, 0.1], [0.2, 0.3, 0.2], tau_prior=dist.HalfCauchy(1.0))
    assert math.isfinite(three.mu.sd)


def test_the_default_prior_has_the_units_of_the_data() -> None:
    y, s = (np.array(part) for part in SHORT)
    one, large = bm.models.meta_analysis(y, s), bm.models.meta_analysis(1e3 * y, 1e3 * s)
    assert large.mu.sd == pytest.approx(1e3 * one.mu.sd, rel=1e-9)
    assert large.bayes_factor_tau0 == pytest.approx(one.bayes_factor_tau0, rel=1e-9)
    typical = float(np.mean(s**-2.0)) ** -0.5
    same = bm.models.meta_analysis(y, s, tau_prior=lambda tau: np.log(typical / (typical + tau) ** 2))
    assert one.tau.mean == pytest.approx(same.tau.mean, rel=1e-12)


def test_tables() -> None:
    found = bm.models.meta_analysis(*SCHOOLS, tau_prior=dist.HalfNormal(8.0), names=list("ABCDEFGH"))
    table = found.shrinkage()
    assert list(table["study"]) == list("ABCDEFGH")
    np.testing.assert_allclose(table["upper"], found.phi.quantile(0.975))
    assert table["weight"].sum() == pytest.approx(100, abs=1e-9)
    assert table.loc[4, "shrinkage"] == table["shrinkage"].min()
    summary = found.summary().set_index("parameter")
    assert list(summary.index) == ["mu", "tau", "new", "i2"]
    assert summary.loc["new", "lower"] == found.new.quantile(0.025)
    assert "8 studies" in repr(found)
    proper = bm.models.meta_analysis(*SCHOOLS, tau_prior=dist.HalfNormal(8.0), mu_prior=(0.0, 5.0))
    assert 50 < proper.weights.sum() < 99


def test_nothing_global_changes_and_the_result_can_be_pickled() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    prior = dist.HalfCauchy(5.0)
    found = bm.models.meta_analysis(*SCHOOLS, tau_prior=prior)
    found.draws(5)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    assert prior.base_dist.scale.dtype == torch.float32
    assert pickle.loads(pickle.dumps(found.mu)).mean == found.mu.mean


def refused(**changes: Any) -> None:
    given = {"effects": SHORT[0], "standard_errors": SHORT[1], "tau_prior": dist.HalfNormal(1.0)} | changes
    bm.models.meta_analysis(given.pop("effects"), given.pop("standard_errors"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effects": [1.0, math.nan]}, r"effects: expected finite numbers, got nan at \(1,\)"),
        ({"effects": [1.0, 2.0]}, r"effects of shape \(2,\) and standard_errors of shape \(5,\)"),
        ({"standard_errors": [0.3, 0.25, 0.0, 0.4, 0.15]}, "expected positive numbers, got 0 for 'study 3'"),
        ({"names": ["a", "a", "b", "c", "d"]}, "names: expected 5 different names"),
        ({"tau_prior": np.zeros_like}, r"expected a proper prior.*got .*e\+1.*Bayes factor.*few studies"),
        ({"tau_prior": lambda tau: -np.log(tau)}, "expected a proper prior"),
        ({"tau_prior": dist.Normal(0.0, 1.0)}, "got 0.5"),
        ({"tau_prior": dist.Delta(torch.tensor(1.0))}, "is it a point mass"),
        ({"tau_prior": 1.0}, "expected a distribution on .* got float"),
        ({"tau_prior": dist.HalfNormal(torch.ones(2))}, r"the distribution of one scale, got one of shape \(2,\)"),
        ({"tau_prior": lambda tau: 0.0}, r"expected a log density of shape \(\d+,\), got \(\)"),
        ({"tau_prior": lambda tau: tau * np.nan}, "log density is nan at tau"),
        ({"mu_prior": 3.0}, r"mu_prior: expected a pair \(mean, sd\)"),
        ({"mu_prior": (0.0, 0.0)}, "mu_prior: expected a positive sd, got 0; None is a flat prior"),
        ({"mu_prior": (math.inf, 1.0)}, "mu_prior: .*finite numbers, got inf"),
        ({"covariates": np.ones(5)}, "data that determine the 2 coefficients"),
        ({"covariates": np.ones((4, 1))}, r"covariates: expected shape \(5, p\), a row a study, got \(4, 1\)"),
        ({"covariates": {"a": [1.0], "b": [1.0, 2.0]}}, r"columns of one length, got \[1, 2\]"),
    ],
)
def test_errors_say_what_was_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(**changes)


def test_errors_of_the_result() -> None:
    found = bm.models.meta_analysis([0.8], [0.2], tau_prior=dist.HalfNormal(1.0))
    with pytest.raises(ValueError, match=r"i2: expected more studies than coefficients \(1\), got 1"):
        found.i2  # noqa: B018
    with pytest.raises(ValueError, match="expected 'mu', 'beta', .* got 'theta'"):
        found.mean("theta")
    for marginal in (found.mu, found.tau):
        with pytest.raises(ValueError, match=r"q: expected probabilities strictly between 0 and 1, got \[0.0, 0.5\]"):
            marginal.quantile([0.0, 0.5])
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        found.draws(0)
