"""The marginal path against exact moments, and its three posteriors of θ."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, centre, close, conditional, exact, known_mean, make_tasks
from torch import nn

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import marginal, mode
from bayesmeta.inference.evidence import Evidence
from bayesmeta.inference.marginal import Signed
from benchmarks import exact_posteriors
from benchmarks.exact_posteriors import eight_schools, schools

pytestmark = pytest.mark.usefixtures("uncompiled")


def test_the_mode_is_that_of_log_tau_with_the_jacobian() -> None:
    fit = bm.fit(eight_schools, schools(), method=bm.Marginal(shared="map"), progress=False)
    assert float(fit.shared.mean("tau")) == pytest.approx(3.63, abs=0.01)
    assert np.isnan(fit.shared.sd("tau"))
    assert fit.shared.status == "plug-in"


def test_names_of_posteriors() -> None:
    with pytest.raises(ValueError, match=r"shared must be one of \['map', 'normal', 'nuts'\], got 'vi'"):
        bm.Marginal(shared="vi")


def test_a_normal_is_corrected_to_the_exact_posterior() -> None:
    mean, covariance = exact(ROWS)
    fit = bm.fit(centre, make_tasks(ROWS), method=bm.Marginal(shared="normal"), progress=False)
    assert fit.shared.status == "corrected" and fit.shared.khat < 0.7
    assert close(
        fit.shared.mean("mu"), fit.shared.sd("mu"), (mean[-1], covariance[-1, -1] ** 0.5), 4000 * fit.shared.ess
    )


def test_a_normal_at_a_skewed_mode_is_corrected() -> None:
    """Eight schools: log tau has a long left tail, which the normal at the mode does not have."""
    moments = exact_posteriors.exact("eight_schools")
    fit = bm.fit(eight_schools, schools(), method=bm.Marginal(shared="normal", draws=4000), progress=False)
    assert fit.shared.status == "corrected"
    for name in ("mu", "tau"):
        answer = moments[name]
        z = abs(fit.shared.mean(name) - answer[0]) / answer[1] * np.sqrt(16_000 * fit.shared.ess)
        assert z < 4, name


def test_history_says_how_it_was_done() -> None:
    fit = bm.fit(centre, make_tasks(ROWS), method=bm.Marginal(shared="map"), progress=False)
    (stage,) = fit.history.stages
    assert stage["kind"] == "closed form" and stage["error"] == 0 and stage["done"] and stage["seconds"] > 0
    assert f"in {stage['seconds']:.1f} s" in repr(fit) and "a point estimate" in repr(fit)


def rates(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Poisson(a.exp().expand(batch.y.shape)), obs=batch.y)


def learned_rate(batch: bm.Batch) -> None:
    mu = pyro.param("mu", torch.tensor(0.0, dtype=torch.float64))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Poisson(a.exp().expand(batch.y.shape)), obs=batch.y)


COUNTS = bm.Tasks.from_arrays(None, [[0.0, 1.0], [2.0], [3.0, 1.0, 0.0]])


def test_chains_that_have_not_mixed_are_not_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marginal, "TOLERATED", -1.0)
    with pytest.warns(UserWarning, match="have not mixed well.*or tighter priors$"):
        fit = bm.fit(rates, COUNTS, method=bm.Marginal(chains=2, warmup=50, draws=40), progress=False)
    assert fit.shared.status == "uncorrected" and not fit.history.stages[0]["done"]
    assert fit.history.stages[0]["error"] < 0.1
    fit = bm.fit(rates, COUNTS, method=bm.Marginal(chains=2, warmup=50, draws=400), progress=False)
    assert fit.shared.status == "corrected" and fit.history.stages[0]["done"]


def test_an_error_that_is_not_known_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = bm.fit(learned_rate, COUNTS, method=bm.Marginal(shared="map"), progress=False)
    assert fit.history.stages[0]["kind"] == "quadrature" and math.isnan(fit.history.stages[0]["error"])
    monkeypatch.setattr(marginal, "TOLERATED", -1.0)
    fit = bm.fit(rates, COUNTS, method=bm.Marginal(shared="map"), progress=False)
    assert fit.shared.status == "plug-in" and not fit.history.stages[0]["done"]


def waves(batch: bm.Batch) -> None:
    """A frequency a task, of which the log joint has many modes."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(torch.sin(a * batch.x[..., 0]), sigma), obs=batch.y)


def wave_tasks(*, empty: int = 0) -> bm.Tasks:
    rng = np.random.default_rng(0)
    x, a = rng.uniform(0, 3, (20, 12, 1)), rng.normal(0, 2, (20, 1))
    y = np.sin(a * x[..., 0]) + 0.1 * rng.normal(size=(20, 12))
    return bm.Tasks.from_arrays([*[x[0, :0]] * empty, *x], [*[y[0, :0]] * empty, *y])


@pytest.mark.parametrize("empty", [0, 1])
def test_tasks_are_integrated_around_the_best_of_their_modes(empty: int) -> None:
    """From the prior's centre alone Newton's steps end at modes that a σ of .53 explains."""
    fit = bm.fit(waves, wave_tasks(empty=empty), method=bm.Marginal(shared="map", chains=1, draws=50), progress=False)
    assert float(fit.shared.mean("sigma")) == pytest.approx(0.1, abs=0.02)
    assert fit.history.stages[0]["error"] < 0.1  # importance sampling starts from these modes too


def test_tasks_without_any_row_have_evidence_without_error() -> None:
    method = bm.Marginal(shared="map", chains=1, draws=50)
    fit = bm.fit(waves, bm.Tasks.from_arrays([np.zeros((0, 1))] * 2, [np.zeros(0)] * 2), method=method, progress=False)
    assert fit.history.stages[0]["error"] == 0 and fit.history.stages[0]["done"]


def test_a_point_at_poor_modes_of_tasks_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode, "ROUNDS", 0)
    with pytest.warns(UserWarning, match=r"quadrature, around one mode each\) is off by .* nats \(limit 3\)"):
        fit = bm.fit(waves, wave_tasks(), method=bm.Marginal(shared="map", chains=1, draws=50), progress=False)
    assert float(fit.shared.mean("sigma")) > 0.3 and not fit.history.stages[0]["done"]


def test_draws_around_poor_modes_of_tasks_are_uncorrected(monkeypatch: pytest.MonkeyPatch) -> None:
    method = bm.Marginal(shared="normal", chains=1, draws=50)
    assert bm.fit(waves, wave_tasks(), method=method, progress=False).shared.mean("sigma") == pytest.approx(
        0.1, abs=0.02
    )
    monkeypatch.setattr(mode, "ROUNDS", 0)
    fit = bm.fit(waves, wave_tasks(), method=method, progress=False)
    assert fit.shared.status == "uncorrected" and fit.history.stages[0]["error"] > 3


def squares(batch: bm.Batch) -> None:
    """The prior's centre is a saddle of every log joint."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(0.0, 1.5))
        with batch.observations():
            pyro.sample("y", dist.Normal(a**2 * batch.x[..., 0], sigma), obs=batch.y)


def test_a_saddle_at_the_centre_of_the_prior_is_left() -> None:
    rng = np.random.default_rng(1)
    x, a = rng.uniform(0, 2, (10, 8, 1)), rng.normal(0, 1.5, (10, 1))
    tasks = bm.Tasks.from_arrays(list(x), list(a**2 * x[..., 0] + 0.1 * rng.normal(size=(10, 8))))
    fit = bm.fit(squares, tasks, method=bm.Marginal(shared="map", chains=1, draws=50), progress=False)
    assert float(fit.shared.mean("sigma")) == pytest.approx(0.1, abs=0.02)


def test_no_shared_parameters() -> None:
    fit = bm.fit(known_mean, make_tasks(ROWS), method="marginal", progress=False)
    mean, sd = conditional(ROWS, 0.0)
    post = fit.posterior(make_tasks(ROWS), draws=2000)
    assert fit.shared.names == () and set(post.method) == {"exact"}
    assert close(post.mean("a"), post.sd("a"), (mean, sd), 2000)


def test_single_precision_is_inferred_in_double() -> None:
    mean, covariance = exact(ROWS)
    fit = bm.fit(centre, make_tasks(ROWS), method=bm.Marginal(shared="normal"), dtype=torch.float32, progress=False)
    assert fit.history.stages[0]["kind"] == "closed form", "in float32 no task passes for Gaussian"
    answer = mean[-1], covariance[-1, -1] ** 0.5
    assert close(fit.shared.mean("mu"), fit.shared.sd("mu"), answer, 4000 * fit.shared.ess)
    assert fit.posterior(make_tasks(ROWS), draws=20).draws("a").shape == (20, 5)


@pytest.mark.parametrize("shared", ["map", "normal"])
def test_a_neural_predictor_is_learned(shared: str) -> None:
    rng = np.random.default_rng(0)
    x = [rng.uniform(-2, 2, (8, 1)) for _ in range(12)]
    tasks = bm.Tasks.from_arrays(x, [np.sin(2 * v[:, 0]) + rng.normal() + 0.1 * rng.normal(size=8) for v in x])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    before = [p.clone() for p in net.parameters()]

    def model(batch: bm.Batch) -> None:
        curve = pyro.module("net", net)(batch.x)[..., 0]
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(curve + a, sigma), obs=batch.y)

    fit = bm.fit(model, tasks, method=bm.Marginal(shared=shared), progress=False)
    assert float(fit.shared.mean("sigma")) < 0.2
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    grid = torch.linspace(-1.8, 1.8, 30)[:, None]
    curve = fit.modules["net"](grid)[:, 0].detach().numpy()
    wave = np.sin(2 * grid[:, 0].numpy())
    assert np.corrcoef(curve, wave)[0, 1] > 0.97
    for method in ("marginal", "nuts"):
        with pytest.raises(ValueError, match=r"trains \['net\$\$\$.*freeze the module"):
            bm.fit(model, tasks, method=method, progress=False)


@pytest.mark.parametrize("method", [bm.Marginal(shared="map"), bm.Marginal(), bm.NUTS()])
def test_checkpoints_are_refused(method: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keeps no checkpoint; leave checkpoint= out"):
        bm.fit(centre, make_tasks(ROWS), method=method, progress=False, checkpoint=tmp_path / "x.bm")


def test_same_seed_same_draws_and_nothing_global_changes() -> None:
    before = torch.get_num_threads(), torch.get_default_dtype(), list(warnings.filters), torch.get_rng_state()
    method = bm.Marginal(chains=1, warmup=200, draws=800)
    first, second, other = (bm.fit(centre, make_tasks(ROWS), method=method, seed=s, progress=False) for s in (1, 1, 2))
    assert np.array_equal(first.shared.draws("mu"), second.shared.draws("mu"))
    assert not np.array_equal(first.shared.draws("mu"), other.shared.draws("mu"))
    after = torch.get_num_threads(), torch.get_default_dtype(), list(warnings.filters), torch.get_rng_state()
    assert before[:3] == after[:3] and torch.equal(before[3], after[3])


def test_signed_scales_have_the_density_and_gradient_of_theta() -> None:
    tasks = schools()
    density = TaskDensity(eight_schools, tasks)
    evidence, signed = Evidence(density, tasks, kind="closed form"), Signed(density)
    for t in (0.7, -0.7):
        value, gradient = signed.log_density(evidence, np.array([1.0, t]))
        theta = torch.tensor([1.0, np.log(0.7)], dtype=torch.float64)
        assert value == pytest.approx(float(evidence(theta)[0]) - np.log(0.7))
        for k in range(2):
            step = 1e-5 * np.eye(2)[k]
            up, down = (signed.log_density(evidence, np.array([1.0, t]) + s * step)[0] for s in (1, -1))
            assert gradient[k] == pytest.approx((up - down) / 2e-5, rel=1e-5)
    np.testing.assert_allclose(signed.view(np.array([[[1.0, -0.7]]])), [[[1.0, np.log(0.7)]]])
