"""The collection of awkward posteriors: its references are right, and its judge finds what is wrong.

The formulas of the references are compared with the engine's densities; their integrals with closed forms, finer
grids, plain sums over more coordinates and draws from the prior.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from benchmarks import awkward
from benchmarks.awkward_densities import REFERENCES
from benchmarks.awkward_models import CASES
from benchmarks.references import Array, Grid, Rows, Truth, differences, each

WHITENED = {"rare_positives", "zero_counts", "square_shared", "easy_normal", "easy_poisson"}
GRIDS = [name for name, reference in REFERENCES.items() if isinstance(reference, Grid)]
KINKS = {"laplace_prior", "rectified", "change_point", "phase"}
"""Kinks, jumps and a circle cut open: sums over grids converge slowly."""


def _funnel(u: list[Array], rows: Rows) -> Array:
    prior = stats.norm(0, 1.5).logpdf(u[0]) + stats.norm(0, np.exp(u[0])).logpdf(u[1])
    return prior + stats.norm(u[1], 0.5).logpdf(rows["y"]).sum(0)


def _small_noise(u: list[Array], rows: Rows) -> Array:
    s = np.exp(u[1])
    prior = stats.norm(0, 1).logpdf(u[0]) + stats.halfnorm.logpdf(s) + u[1]
    return prior + stats.norm(u[0], s).logpdf(rows["y"]).sum(0)


def _phase(u: list[Array], rows: Rows) -> Array:
    wave = u[0] * np.sin(rows["x"][..., 0] + math.pi * (2 * expit(u[1]) - 1))
    prior = stats.norm(0, 1.5).logpdf(u[0]) + stats.logistic.logpdf(u[1])
    return prior + stats.norm(wave, 0.3).logpdf(rows["y"]).sum(0)


def _twenty(u: list[Array], rows: Rows) -> Array:
    mean = sum(rows["x"][..., k] * v for k, v in enumerate(u))
    return sum(stats.norm.logpdf(v) for v in u) + stats.t(2, mean, 0.1).logpdf(rows["y"]).sum(0)


def _sparse(u: list[Array], rows: Rows) -> Array:
    mean = sum(rows["x"][..., k] * v for k, v in enumerate(u))
    return sum(stats.laplace.logpdf(v) for v in u) + stats.norm(mean, 0.5).logpdf(rows["y"]).sum(0)


def _mirror(u: list[Array], rows: Rows) -> Array:
    seen = [u[0] ** 2, *u[1:]]
    mean = sum(rows["x"][..., k] * v for k, v in enumerate(seen))
    return sum(stats.norm.logpdf(v) for v in u) + stats.norm(mean, 0.1).logpdf(rows["y"]).sum(0)


JOINTS = {
    "mirror": _mirror,
    "funnel": _funnel,
    "small_noise": _small_noise,
    "phase": _phase,
    "twenty": _twenty,
    "sparse": _sparse,
}
"""Where the reference integrates some coordinates in closed form: all of them, in the engine's order."""


@pytest.mark.parametrize("name", CASES)
def test_the_engine_has_the_density_that_the_reference_states(name: str) -> None:
    tasks, random = CASES[name].tasks(count=8), np.random.default_rng(3)
    density = TaskDensity(CASES[name].model, tasks)
    noise = 0.8 * random.normal(size=(20, 8, density.structure.task_size))
    theta = 0.5 * random.normal(size=(20, density.structure.shared_size))
    log_task = density.log_task if name in WHITENED else density.log_task_unconstrained
    data = density.tensors(tasks.batch(slice(None)))
    ours = log_task.mapped(torch.as_tensor(theta), torch.as_tensor(noise), data, {}, in_dims=(0, 0, None, None))
    for task, rows in enumerate(each(tasks)):
        u = [noise[:, task, k, None] for k in range(noise.shape[-1])]
        shared = tuple(theta[:, k, None] for k in range(theta.shape[-1]))
        joint = JOINTS[name](u, rows) if name in JOINTS else REFERENCES[name].log_density(shared, tuple(u), rows)
        difference = ours[:, task].numpy() - joint[:, 0]
        np.testing.assert_allclose(difference, difference[0], atol=1e-8 * max(1.0, np.abs(joint).max()))


@pytest.mark.parametrize("name", [name for name in GRIDS if REFERENCES[name].theta])
def test_the_engine_has_the_prior_of_theta_that_the_reference_states(name: str) -> None:
    reference, density = REFERENCES[name], TaskDensity(CASES[name].model, CASES[name].tasks(count=2))
    theta = np.random.default_rng(4).normal(size=(20, len(reference.theta)))
    ours = density.log_prior(torch.as_tensor(theta)).numpy()
    difference = ours - reference.log_prior(tuple(theta[:, k, None] for k in range(theta.shape[-1])))[:, 0]
    np.testing.assert_allclose(difference, difference[0], atol=1e-9)


def test_theta_is_integrated_over() -> None:
    """The Gaussian model: given θ all is closed form, so that only a sum over (mu, log tau) is left."""
    tasks = CASES["easy_normal"].tasks()
    truth = REFERENCES["easy_normal"](tasks)
    n, mean = (np.array([f(rows["y"]) for rows in each(tasks)]) for f in (len, np.mean))
    mu, log_tau = np.meshgrid(np.linspace(-2, 4, 201), np.linspace(-3, 2, 201), indexing="ij")
    tau = np.exp(log_tau)[..., None]
    log_p = stats.norm(0, 5).logpdf(mu) + stats.norm(0, 0.5).logpdf(log_tau)
    log_p = log_p + stats.norm(mu[..., None], np.sqrt(tau**2 + 1 / n)).logpdf(mean).sum(-1)
    weight = np.exp(log_p - log_p.max())
    weight = (weight / weight.sum())[..., None]
    precision = tau**-2 + n
    given = (mu[..., None] * tau**-2 + n * mean) / precision
    first = (weight * given).sum((0, 1))
    second = (weight * (given**2 + 1 / precision)).sum((0, 1))
    np.testing.assert_allclose(truth.mean["phi"], first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(truth.sd["phi"], np.sqrt(second - first**2), rtol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_finer_and_wider_grids_agree(name: str) -> None:
    reference, tasks = REFERENCES[name], CASES[name].tasks(count=8)
    tasks = tasks if reference.theta else tasks[[1, 5]]
    shift, spread = differences(reference(tasks), reference.finer(factor=1.3, wider=1.1)(tasks))
    assert max(shift, spread) < (5e-3 if name in KINKS else 1e-4)


@pytest.mark.parametrize("name", [name for name in GRIDS if len(REFERENCES[name].box + REFERENCES[name].theta) == 1])
def test_exact_draws_would_pass_the_judge(name: str) -> None:
    """The sd of N draws has the relative error sqrt((kurtosis - 1) / 4N): of 10,000 draws less than a third of 30 %."""
    reference = REFERENCES[name]

    def powers(theta: Any, u: Any, rows: Rows) -> Any:
        found = {k: (np.asarray(v), variance) for k, (v, variance) in reference.moments(theta, u, rows).items()}
        return {f"{k}{p}": (power(v, s, p), 0.0) for k, (v, s) in found.items() for p in (1, 2, 3, 4)}

    def power(v: Array, s: Any, p: int) -> Array:
        return (v, v**2 + s, v**3 + 3 * v * s, v**4 + 6 * v**2 * s + 3 * s**2 + 0 * v)[p - 1]

    truth = replace(reference, moments=powers)(CASES[name].tasks())
    for site in (k[:-1] for k in truth.mean if k.endswith("1")):
        one, two, three, four = (truth.mean[f"{site}{p}"] for p in (1, 2, 3, 4))
        variance = two - one**2
        kurtosis = (four - 4 * one * three + 6 * one**2 * two - 3 * one**4) / variance**2
        assert math.sqrt((kurtosis.max() - 1) / 40_000) < awkward.SD_LIMIT / 2.9, site


def test_a_grid_that_is_too_coarse_or_narrow_is_noticed() -> None:
    tasks, reference = CASES["heavy_tails"].tasks(count=8), REFERENCES["heavy_tails"]
    wrong = Grid(reference.log_density, reference.moments, ((-1.0, 1.0),), 8001)
    coarse = Grid(reference.log_density, reference.moments, reference.box, 21, stretched=True)
    for grid in (wrong, coarse):
        assert max(differences(grid(tasks), grid.finer()(tasks))) > 1e-2


def test_probabilities_follow_the_beta_distribution() -> None:
    tasks = CASES["edge_probability"].tasks()
    truth = REFERENCES["edge_probability"](tasks)
    wins, trials = (np.array([rows[k].sum() for rows in each(tasks)]) for k in ("y", "trials"))
    exact = stats.beta(0.5 + wins, 0.5 + trials - wins)
    np.testing.assert_allclose(truth.mean["p"], exact.mean(), rtol=1e-9)
    np.testing.assert_allclose(truth.sd["p"], exact.std(), rtol=1e-7)
    assert (wins == 0).any() and (wins == trials).any()


def test_a_mixture_of_priors_gives_a_mixture_of_posteriors() -> None:
    tasks = CASES["mixture_prior"].tasks()
    truth = REFERENCES["mixture_prior"](tasks)
    for index, rows in enumerate(each(tasks)):
        n, mean = len(rows["y"]), rows["y"].mean()
        precision = 4 + n / 36
        loc = (4 * np.array([-4.0, 4.0]) + n / 36 * mean) / precision
        weight = stats.norm([-4.0, 4.0], math.sqrt(0.25 + 36 / n)).pdf(mean)
        weight /= weight.sum()
        sd = math.sqrt(1 / precision + weight @ (loc - weight @ loc) ** 2)
        np.testing.assert_allclose([truth.mean["phi"][index], truth.sd["phi"][index]], [weight @ loc, sd], rtol=1e-8)


@pytest.mark.parametrize(
    ("name", "box", "sites"),
    [
        ("funnel", ((-9.0, 9.0), (-25.0, 25.0)), ("v", "w")),
        ("small_noise", ((-6.0, 6.0), (-2.0, 2.0)), ("m", "s")),
        ("phase", ((-9.0, 9.0), (-14.0, 14.0)), ("a", "shift")),
    ],
)
def test_closed_forms_agree_with_sums_over_all_coordinates(name: str, box: Any, sites: tuple[str, str]) -> None:
    """Tasks with 10 and 30 rows: the sums resolve them."""
    maps = {"s": np.exp, "shift": lambda u: math.pi * (2 * expit(u) - 1)}

    def moments(theta: Any, u: Any, rows: Rows) -> Any:
        return {site: (maps.get(site, lambda v: v)(u[k]), 0.0) for k, site in enumerate(sites)}

    full = CASES[name].tasks(count=40)
    widths = REFERENCES[name](full).sd[sites[1]]
    tasks = full[[i for i in range(40) if full.sizes[i] >= 10 and widths[i] > 0.02][:2]]
    brute = Grid(lambda theta, u, rows: JOINTS[name](list(u), rows), moments, box, 501)
    assert max(differences(REFERENCES[name](tasks), brute(tasks))) < 5e-3


@pytest.mark.parametrize("name", ["twenty", "sparse"])
def test_twenty_parameters_agree_with_weighted_draws_of_the_prior(name: str) -> None:
    tasks, draws = CASES[name].tasks(count=3), 200_000
    truth, random = REFERENCES[name](tasks), np.random.default_rng(5)
    for index, rows in enumerate(each(tasks)):
        phi = random.normal(size=(draws, 20)) if name == "twenty" else random.laplace(size=(draws, 20))
        mean = phi @ rows["x"].reshape(2, 20).T
        noise = stats.t(2, mean, 0.1) if name == "twenty" else stats.norm(mean, 0.5)
        weight = np.exp(noise.logpdf(rows["y"].reshape(2)).sum(-1))
        weight /= weight.sum()
        off = (phi - truth.mean["phi"][index]) / truth.sd["phi"][index]
        for terms in (off, off**2 - 1):
            error = np.sqrt((weight[:, None] ** 2 * terms**2).sum(0)) + 1e-9
            assert (np.abs(weight @ terms) < 4.5 * error).all()
            assert error.max() < 0.2


def test_mirror_agrees_with_sums_over_two_of_its_parameters() -> None:
    tasks = CASES["mirror"].tasks(count=2)
    truth = REFERENCES["mirror"](tasks)
    for index, rows in enumerate(each(tasks)):
        last = truth.mean["phi"][index, 1:, None, None]
        grid = Grid(
            lambda theta, u, rows, last=last: JOINTS["mirror"]([u[0], u[1], *last[1:]], rows),
            lambda theta, u, rows: {"phi": (np.stack(u, -1), 0.0)},
            ((-6, 6), (-6, 6)),
            301,
        )(tasks[[index]])
        np.testing.assert_allclose(grid.mean["phi"][0], truth.mean["phi"][index, :2], atol=1e-6)
        np.testing.assert_allclose(grid.sd["phi"][0], truth.sd["phi"][index, :2], rtol=1e-5)
    assert np.abs(truth.mean["phi"][:, 0]).max() < 1e-9, "both signs"


@pytest.mark.parametrize("name", ["zero_counts", "outlier_tasks"])
def test_a_known_task_is_a_new_one_given_all_others(name: str) -> None:
    tasks, reference = CASES[name].tasks(count=9), replace(REFERENCES[name], nodes=401, theta_nodes=25)
    together = reference(tasks)
    for index in (0, 5, 8):
        alone = reference(tasks[[index]], given=tasks[[i for i in range(9) if i != index]])
        np.testing.assert_allclose(alone.mean["phi"][0], together.mean["phi"][index], rtol=1e-9)
        np.testing.assert_allclose(alone.sd["phi"][0], together.sd["phi"][index], rtol=1e-9)
    without = reference(tasks[[5]], given=tasks[[6]])
    assert abs(without.mean["phi"][0] - together.mean["phi"][5]) > 1e-3, "the other tasks teach θ"


def _posterior(truth: Truth, *, shift: Array, factor: Array, flag: list[str]) -> Any:
    count, khat = len(flag), np.full(len(flag), 0.1)
    shape = (count, *[1] * (truth.sd["phi"].ndim - 1))
    mean = truth.mean["phi"] + shift.reshape(shape) * truth.sd["phi"]
    sd = truth.sd["phi"] * factor.reshape(shape)
    return SimpleNamespace(
        names=tuple("abcdef"[:count]),
        mean=lambda site: mean,
        sd=lambda site: sd,
        flag=np.array(flag, dtype=object),
        khat=khat,
        ess=khat,
        method=np.array(["psis"] * count, dtype=object),
    )


@pytest.mark.parametrize("name", ["heavy_tails", "product"])
def test_the_judge_finds_wrong_posteriors(name: str) -> None:
    tasks = CASES[name].tasks(count=6)
    truth = REFERENCES[name](tasks)
    truth = Truth({"phi": next(iter(truth.mean.values()))}, {"phi": next(iter(truth.sd.values()))})
    shift, factor = np.array([0.29, -0.31, 0.0, 0.0, 0.9, np.nan]), np.array([1.29, 1.0, 0.69, 1.31, 1.0, 1.0])
    verdict = awkward.judge(_posterior(truth, shift=shift, factor=factor, flag=["", "", "", "", "bad", ""]), truth)
    assert verdict.off.tolist() == [False, True, True, True, True, True]
    assert verdict.missed.tolist() == [False, True, True, True, False, True]
    np.testing.assert_allclose(verdict.error[:5], np.abs(shift[:5]), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(verdict.ratio, factor, rtol=1e-9)
    assert verdict.unflagged == pytest.approx(5 / 6)
    assert len(awkward.details(verdict, tasks)) == 4
    assert awkward.details(verdict, tasks, limit=1)[1:] == ["    missed: 3 more"]
    assert awkward.verdict_on({name: verdict}).startswith("4 tasks off and not flagged; 0 of 1")


def test_the_judge_reads_a_posterior_of_the_engine() -> None:
    """A guide that was hardly trained, unchecked: everything is flagged, and the reference shows that it is off."""
    case = CASES["one_example"]
    tasks = case.tasks(count=8)
    fit = bm.fit(case.model, tasks, method=bm.Amortized(optimizer=bm.Optimizer(steps=2)), progress=False)
    raw = awkward.judge(fit.posterior(tasks, refine="none"), REFERENCES["one_example"](tasks))
    assert raw.flagged.all() and raw.off.mean() > 0.5 and not raw.missed.any()


@pytest.mark.parametrize("name", ["square", "mixture_prior", "heavy_tails", "laplace_prior"])
def test_the_ladder_is_right_or_says_so(name: str) -> None:
    """Two modes, mixtures, outliers, kinks; the other models are in `benchmarks/awkward.py`."""
    case = CASES[name]
    tasks = case.tasks(count=6)
    posterior = bm.fit(case.model, tasks, method="marginal", progress=False).posterior(tasks)
    verdict = awkward.judge(posterior, REFERENCES[name](tasks))
    assert not verdict.missed.any() and verdict.unflagged >= 0.7
