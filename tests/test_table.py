"""The table of learners: its scores against closed forms, its pairing, its baselines and its Markdown."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import Tensor
from torch.distributions import Categorical as Codes
from torch.distributions import Distribution, MixtureSameFamily, Normal

import bayesmeta as bm
from bayesmeta.data.families.kernels import rbf
from benchmarks import learners, pooling, sensors, table
from benchmarks.modes import BothKinds
from benchmarks.predictors import Conditional, Direct, Hierarchical, trivial
from benchmarks.report import HEADINGS, Row, Table
from benchmarks.scores import Predicted, Scores, paired, score
from benchmarks.suites import DATA, Evaluation, Suite, known_kernels, of_family, suites

TASKS, ROWS = 300, 6
SIZES = np.where(np.arange(TASKS) % 3 == 0, 2, ROWS)


def ragged(seed: int = 0, spread: float = 1.0) -> tuple[bm.Tasks, bm.Tasks]:
    """Standard normal labels; contexts of 0 to 4 rows in no order of size."""
    rng = np.random.default_rng(seed)
    given = rng.integers(0, 5, size=TASKS)
    names = [f"{seed}.{i}" for i in range(TASKS)]

    def tasks(sizes: np.ndarray) -> bm.Tasks:
        y = [spread * rng.normal(size=n) for n in sizes]
        return bm.Tasks.from_arrays([rng.normal(size=(n, 1)) for n in sizes], y, names=names)

    return tasks(given), tasks(SIZES)


def normal(loc: float, sd: float) -> Direct:
    return Direct(lambda context, x: Normal(x.new_full(x.shape[:2], loc), sd))


def labels(tasks: bm.Tasks) -> np.ndarray:
    batch = tasks.batch(slice(None))
    return np.where(batch.mask.numpy(), batch.y.numpy(), np.nan)


@pytest.fixture(scope="module")
def at() -> tuple[bm.Tasks, bm.Tasks]:
    return ragged()


@pytest.fixture(scope="module")
def exact(at: tuple[bm.Tasks, bm.Tasks]) -> Scores:
    return score(normal(0.0, 1.0), *at)


def test_log_scores_and_errors_are_those_of_closed_forms(at: tuple[bm.Tasks, bm.Tasks]) -> None:
    found, y = score(normal(0.5, 2.0), *at), labels(at[1])
    np.testing.assert_allclose(found.log_prob, norm(0.5, 2.0).logpdf(y), rtol=1e-12)
    np.testing.assert_allclose(found.squared, (y - 0.5) ** 2, rtol=1e-12)
    assert found.joint is not None
    np.testing.assert_allclose(found.joint, np.nanmean(norm(0.5, 2.0).logpdf(y), 1), rtol=1e-12)
    squared = np.nanmean((y - 0.5) ** 2, 1)
    np.testing.assert_allclose(found.rmse(), [np.sqrt(squared.mean()), np.sqrt(squared).mean()], rtol=1e-12)


def test_crps_and_ranks_are_those_of_closed_forms(at: tuple[bm.Tasks, bm.Tasks]) -> None:
    """Errors of 399 draws, shared by the rows of no two tasks; |z| < 4."""
    found, y = score(normal(0.5, 2.0), *at), labels(at[1])
    z = (y - 0.5) / 2
    crps = 2 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi))
    for ours, theirs in ((found.crps, crps), (found.pit, norm.cdf(z))):
        difference = (ours - theirs)[~np.isnan(y)]
        assert 0 < np.abs(difference).max()
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)
    assert (found.pit > 0)[~np.isnan(y)].all() and (found.pit < 1)[~np.isnan(y)].all()


@pytest.mark.parametrize("sd", [1.0, 0.5])
def test_coverage_is_what_a_normal_distribution_covers(at: tuple[bm.Tasks, bm.Tasks], sd: float) -> None:
    found = score(normal(0.0, sd), *at).coverage()
    for share, prob in zip(found, (0.5, 0.8, 0.9, 0.95), strict=True):
        truth = 2 * norm.cdf(sd * norm.ppf(0.5 + prob / 2)) - 1
        assert abs(share - truth) < 4 * math.sqrt(truth * (1 - truth) / (TASKS * 2))


def test_calibration_error_of_tasks_has_a_floor_and_the_pooled_one_has_none(exact: Scores) -> None:
    """With n independent rows a task the mean square over levels q is Σ q (1 − q) / n; its root's mean is smaller."""
    within, pooled = exact.calibration()
    q = np.linspace(0.05, 0.95, 20)
    floor = np.mean([math.sqrt((q * (1 - q)).mean() / n) for n in SIZES])
    assert 0.7 * floor < within < floor
    assert pooled < 4 * math.sqrt((q * (1 - q)).mean() / (2 * TASKS)) < 0.5 * within


def test_chunks_put_scores_where_their_tasks_are(
    at: tuple[bm.Tasks, bm.Tasks], exact: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.scores.ELEMENTS", 7 * 399 * ROWS)
    found = score(normal(0.0, 1.0), *at)
    np.testing.assert_array_equal(found.log_prob, exact.log_prob)
    np.testing.assert_array_equal(found.joint, exact.joint)


def test_the_oracle_has_no_gap_and_a_worse_predictor_a_negative_one(
    at: tuple[bm.Tasks, bm.Tasks], exact: Scores
) -> None:
    assert paired(exact.log_prob, exact.log_prob) == (0.0, 0.0)
    worse = score(normal(0.0, 1.5), *at)
    mean, error = paired(worse.log_prob, exact.log_prob)
    divergence = math.log(1.5) + 0.5 / 1.5**2 - 0.5
    assert abs(mean + divergence) < 4 * error < divergence
    assert paired(worse.joint, exact.joint)[0] == pytest.approx(mean, rel=1e-12)
    alone = worse.log_prob[:, 0].std() / math.sqrt(TASKS)
    assert error < alone, "pairing takes out what tasks have in common"
    assert all(math.isnan(value) for value in paired(None, exact.joint))


class Shared:
    """Rows y_j = a + ε_j with a ~ N(0, 1): their joint density is not the product of the marginal ones."""

    def function(self, context: bm.Batch, x: Tensor) -> Distribution:
        precision = 1 + context.n.double()
        loc = (context.y * context.mask).sum(1) / precision
        return Normal(loc[:, None].expand(x.shape[:2]), (1 / precision + 1).sqrt()[:, None].expand(x.shape[:2]))


@pytest.mark.parametrize("limit", [50, 4])
def test_joint_scores_follow_the_chain_rule_over_the_first_rows(at: tuple[bm.Tasks, bm.Tasks], limit: int) -> None:
    context, target = at
    model = bm.ConditionalModel(Shared().function)
    fit = bm.fit(model, context, progress=False)
    found = score(Conditional(fit), context, target, draws=19, joint_rows=limit)
    assert found.joint is not None and Conditional(fit).parameters == 0
    for task in (0, 1, 2, 17):
        given, new = context[task].y.numpy(), target[task].y.numpy()[:limit]

        def log_p(y: np.ndarray) -> float:
            return float(multivariate_normal(np.zeros(len(y)), 1 + np.eye(len(y))).logpdf(y)) if len(y) else 0.0

        wanted = (log_p(np.concatenate([given, new])) - log_p(given)) / len(new)
        assert found.joint[task] == pytest.approx(wanted, rel=1e-5)
    assert score(Conditional(fit), context[:5], target[:5], draws=19, joint_rows=0).joint is None


def test_a_hierarchical_fit_is_scored_by_its_posterior() -> None:
    """Its exact predictive is that of `Shared`, θ being known nearly: within .02 nats a row."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=(400, 1)) + rng.normal(size=(400, 8))
    tasks = bm.Tasks.from_arrays(None, list(y), names=[f"train {i}" for i in range(400)])
    model = bm.HierarchicalModel(bm.priors.Gaussian(1), lambda phi, x: phi[..., 0], bm.likelihoods.Normal())
    fit = bm.fit(model, tasks, method=bm.Marginal(shared="map", chains=1), progress=False)
    new = rng.normal(size=(60, 1)) + rng.normal(size=(60, 8))
    held_out = bm.Tasks.from_arrays(None, list(new), names=[f"new {i}" for i in range(60)])
    context, target = held_out.context_target(context=3, seed=0)
    found = score(Hierarchical(fit), context, target)
    best = score(Direct(Shared().function), context, target)
    mean, error = paired(found.log_prob, best.log_prob)
    assert abs(mean) < 0.02 + 4 * error and error < 0.02
    assert found.joint is not None and best.joint is not None
    together = np.array([multivariate_normal(np.zeros(8), 1 + np.eye(8)).logpdf(row) for row in new])
    first = [multivariate_normal(np.zeros(3), 1 + np.eye(3)).logpdf(task.y.numpy()) for task in context]
    difference = found.joint - (together - np.array(first)) / 5
    assert abs(difference.mean()) < 0.02 + 4 * difference.std() / math.sqrt(60)
    assert found.joint.mean() > best.joint.mean(), "rows that hang together are not scored as if independent"
    assert Hierarchical(fit).parameters == 3


def test_a_score_that_is_no_number_is_refused_with_its_task(at: tuple[bm.Tasks, bm.Tasks]) -> None:
    class Broken:
        parameters = 0

        def predict(self, context: bm.Tasks, target: bm.Tasks, *, draws: int, seed: int) -> Predicted:
            y = labels(target)
            found = np.where(np.array(target.names)[:, None] == "0.4", np.nan, y)
            return Predicted(found, y, np.zeros((draws, *y.shape)))

    with pytest.raises(ValueError, match="log_prob: expected numbers, got NaN in task '0.4'"):
        score(Broken(), *at)
    with pytest.raises(ValueError, match="same tasks in the same order"):
        score(normal(0.0, 1.0), at[0], at[1][::-1])


def test_one_function_is_gaussian_process_regression_on_all_rows() -> None:
    rng = np.random.default_rng(2)
    x, y = torch.tensor(rng.normal(size=(1, 12, 1))), torch.tensor(rng.normal(size=(1, 12)))
    one = pooling.OneFunction("rbf", x, y, length=0.7, scale=1.3, noise=0.4)
    new = bm.Tasks.from_arrays([rng.normal(size=(n, 1)) for n in (3, 0)], [rng.normal(size=n) for n in (3, 0)])
    target = bm.Tasks.from_arrays([rng.normal(size=(4, 1))] * 2, [rng.normal(size=4)] * 2)
    context, asked = (tasks.batch(slice(None)).to(dtype=torch.float64) for tasks in (new, target))
    found, joint = one.function(context, asked.x), one.joint_log_prob(context, asked)
    for task in range(2):
        given = torch.cat([x[0], new[task].x]), torch.cat([y[0], new[task].y])
        inputs = torch.cat([given[0], asked.x[task]])
        length = torch.tensor(0.7, dtype=torch.float64)
        whole = 1.3**2 * rbf(inputs.unsqueeze(1) - inputs, length, length) + 0.4**2 * torch.eye(len(inputs))
        n = len(given[1])
        gain = torch.linalg.solve(whole[:n, :n], whole[:n, n:]).mT
        mean, covariance = gain @ given[1], whole[n:, n:] - gain @ whole[:n, n:]
        torch.testing.assert_close(found.mean[task], mean)
        torch.testing.assert_close(found.variance[task], covariance.diagonal())
        wanted = multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(asked.y[task].numpy())
        assert float(joint[task]) == pytest.approx(float(wanted), rel=1e-6)


def test_pooling_of_gaussian_processes_learns_the_common_surface_and_the_noise() -> None:
    """Of the Cauchy family: alone a task does not know the surface, together they know nothing but the surface."""
    suite = suites()["cauchy"]()
    alone, together = pooling.gaussian_processes(suite.training(20))
    at = suite.evaluation(30)
    scores = [
        score(p, at.context, at.target, draws=39) for p in (at.oracle, alone, together, trivial(suite.training(20)))
    ]
    best, apart, pooled, simple = (found.rmse()[0] for found in scores)
    assert best < pooled < apart < simple
    gaps = [paired(found.log_prob, scores[0].log_prob) for found in scores[1:]]
    assert all(mean < -4 * error for mean, error in gaps)
    joint = [paired(found.joint, scores[0].joint)[0] for found in scores[1:]]
    assert all(gap < 0 for gap in joint)


def test_linear_pooling_is_in_the_units_of_the_labels() -> None:
    """Lines whose coefficients differ little: together they nearly reach the exact predictive, alone they do not."""
    rng = np.random.default_rng(3)

    def lines(count: int, rows: int, name: str) -> bm.Tasks:
        x = rng.normal(size=(count, rows, 2))
        weight = np.array([3.0, -2.0]) + 0.01 * rng.normal(size=(count, 1, 2))
        y = 100 + (x * weight).sum(-1) + 0.5 * rng.normal(size=(count, rows))
        return bm.Tasks.from_arrays(list(x), list(y), names=[f"{name} {i}" for i in range(count)])

    alone, together = pooling.linear(lines(20, 10, "known"))
    context, target = lines(30, 14, "new").context_target(context=4, seed=0)
    scores = [score(predictor, context, target) for predictor in (alone, together)]
    exact = norm(0, 0.5).entropy()
    pooled = np.nanmean(scores[1].log_prob, 1)
    assert abs(pooled.mean() + exact) < 0.03 + 4 * pooled.std() / math.sqrt(30)
    assert scores[1].rmse()[0] == pytest.approx(0.5, abs=0.1) and scores[0].rmse()[0] > 0.6
    assert scores[1].joint is not None
    np.testing.assert_allclose(scores[1].joint, pooled, atol=0.15)


def test_known_kernels_follow_their_tasks() -> None:
    """The mean log score of the known kernel, 1.542 marginal and 1.821 joint, from published recipes; |z| < 4."""
    at = known_kernels(bm.families.GaussianProcesses(), 400)
    assert at.oracle is not None
    found = score(at.oracle, at.context, at.target, draws=19)
    for values, known in ((np.nanmean(found.log_prob, 1), 1.542), (found.joint, 1.821)):
        assert values is not None
        assert abs(values.mean() - known) < 4 * values.std() / math.sqrt(400)
    turned = at.context[::-1], at.target[::-1]
    np.testing.assert_allclose(score(at.oracle, *turned, draws=19).log_prob, found.log_prob[::-1], rtol=1e-9)


@pytest.fixture(scope="module")
def ambiguous() -> tuple[bm.families.SinusoidOrLine, bm.Tasks, bm.Tasks]:
    family = bm.families.SinusoidOrLine(context_rows=3, target_rows=20)
    return family, *family.episodes(150, seed=1)


def judged(family: bm.families.SinusoidOrLine, context: bm.Tasks, target: bm.Tasks, function: object) -> np.ndarray:
    found = score(Direct(function), context, target, joint_rows=0, judge=BothKinds(family))  # type: ignore[arg-type]
    assert found.judged is not None
    return found.judged[~np.isnan(found.judged)]


def test_both_kinds_are_kept_by_the_exact_mixture_and_by_no_other(
    ambiguous: tuple[bm.families.SinusoidOrLine, bm.Tasks, bm.Tasks],
) -> None:
    family, context, target = ambiguous

    def one_normal(old: bm.Batch, x: Tensor) -> Distribution:
        exact = family.oracle(old, x)
        return Normal(exact.mean, exact.stddev)

    def one_kind(old: bm.Batch, x: Tensor) -> Distribution:
        return bm.families.Sinusoids(noise=family.noise).oracle(old, x)

    def weaker(old: bm.Batch, x: Tensor) -> Distribution:
        parts = [family.oracle(old, x), one_kind(old, x)]
        moments = torch.stack([p.mean for p in parts], -1), torch.stack([p.stddev for p in parts], -1)
        return MixtureSameFamily(Codes(torch.ones_like(moments[0])), Normal(*moments))

    kept = judged(family, context, target, family.oracle)
    assert len(kept) > 10 and kept.all()
    for function in (one_normal, one_kind, weaker):
        assert judged(family, context, target, function).mean() < 0.2


def test_markdown_is_well_formed(at: tuple[bm.Tasks, bm.Tasks], exact: Scores) -> None:
    flagged = dataclasses.replace(score(normal(0.0, 1.5), *at, joint_rows=0), flagged=3)
    rows = [
        Row("oracle", exact),
        Row("trivial", None),
        Row("net, seed 0", flagged, 12345, 1.25, "net"),
        Row("net, seed 1", exact, 12345, 1.25, "net"),
    ]
    text = Table("suite", "what it is", rows, TASKS).markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows) and {line.count("|") for line in lines} == {len(HEADINGS) + 1}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][2] == "+0.000 ± 0.000" and set(cells[3][1:]) == {"–"}
    assert cells[4][2].startswith("-0.1") and cells[4][3:5] == ["–", "–"] and "12,345" in cells[4]
    assert "3 of 300 tasks flagged" in text and "net, mean ± sd over 2 seeds" in text
    within, pooled = exact.calibration()
    assert f"the oracle's own, {within:.4f} of a task, {pooled:.4f} pooled" in text


def tiny() -> Suite:
    """So few tasks that none is held out: how long a training is depends on the machine, what stops it would too."""
    return Suite(
        about="few short tasks",
        pooling=pooling.curves,
        training_tasks=16,
        tasks=12,
        context=(5, 5),
        batch_tasks=8,
        **of_family(bm.families.Sinusoids(target_rows=4), rows=12),
    )


def test_the_command_prints_all_rows_and_writes_table_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "suites", lambda data=None: {"tiny": tiny, "other": tiny})
    table.main(
        ["tiny", "--models", "cnp", "--budget", "1", "--seeds", "0", "1", "--also", "other", "--out", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    for name in ("oracle", "trivial", "no pooling", "complete pooling", "cnp, seed 0", "cnp, seed 1"):
        assert printed.count(f"\n| {name} | ") == 2
    first = [line.split("|")[2:16] for line in printed.splitlines() if line.startswith("| cnp, seed 0")]
    assert first[0] == first[1], "the same learner on the same tasks"
    assert (tmp_path / "table.md").read_text(encoding="utf-8").strip().startswith("## tiny")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["other.png", "tiny.png"]


def test_berkeley_is_skipped_where_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.main(["berkeley", "--data", str(tmp_path)])
    assert capsys.readouterr().out.startswith("skipped: ")


def test_a_budget_is_turned_into_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2 seconds, and 10 a run: of 400 seconds the short runs take 30 + 2 (3 + 5 + 35), the last one 10."""
    clock, runs = [0.0], []

    def fit(steps: int) -> int:
        clock[0] += 10 + 2 * steps
        runs.append(steps)
        return steps

    monkeypatch.setattr(learners, "cpu_seconds", lambda: clock[0])
    assert learners.within(400, fit) == (400 - 116 - 10) / 2
    assert clock[0] == 400 and len(runs) == 4
    assert learners.within(1, fit) == 35, "never fewer than it was measured with"


@pytest.mark.parametrize("jitter", [1.0, -1.0])
def test_a_budget_is_kept_where_steps_are_short_beside_the_noise_of_a_run(
    monkeypatch: pytest.MonkeyPatch, jitter: float
) -> None:
    """A step of 10 ms, 6 seconds a run give or take one: 30 steps more are lost in that."""
    clock, runs = [0.0], []

    def fit(steps: int) -> int:
        clock[0] += 6 + 0.01 * steps + (jitter if len(runs) % 2 else -jitter)
        runs.append(steps)
        return steps

    monkeypatch.setattr(learners, "cpu_seconds", lambda: clock[0])
    learners.within(300, fit)
    assert 150 < clock[0] < 400, runs


@pytest.mark.parametrize("name", list(suites()))
def test_every_suite_has_tasks_that_fit_together(name: str) -> None:
    if name == "berkeley" and not (DATA / name).is_dir():
        pytest.skip("the sensors' data are not there")
    suite = suites()[name]()
    tasks, at = suite.training(3), suite.evaluation(4)
    assert isinstance(at, Evaluation) and at.context.names == at.target.names
    assert tasks.schema.x_shape == at.target.schema.x_shape and tasks.schema.y_shape == ()
    assert not set(tasks.names) & set(at.target.names)
    if at.oracle is not None:
        assert np.isfinite(np.nanmean(score(at.oracle, at.context, at.target, draws=9, judge=at.judge).log_prob))


def test_a_learner_that_refuses_the_tasks_keeps_an_empty_row() -> None:
    """The sensors' model of tasks with one input."""
    suite = suites()["sin20"]()
    trained = table.learned_rows(suite, suite.training(5), ["sensors"], budget=1.0, seeds=[0, 1])
    assert trained == [("sensors: refused", "sensors", None, 0.0)]
    found = table.scored("sin20", suite, suite.evaluation(3), trained, draws=9)
    assert found.rows[-1].name == "sensors: refused" and found.rows[-1].scores is None


def test_an_error_while_learning_stops_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(suite: Suite, tasks: bm.Tasks, *, budget: float, seed: int) -> Any:
        raise ValueError("the loss is not finite")

    monkeypatch.setitem(learners.LEARNERS, "diverges", diverges)
    suite = suites()["sin20"]()
    with pytest.raises(ValueError, match="not finite"):
        table.learned_rows(suite, suite.training(5), ["diverges"], budget=1.0, seeds=[0])


def test_the_sensors_model_learns_what_moves_readings_and_their_noise() -> None:
    """Readings that return to the one before, and are noisier where they have just moved more."""
    rng = np.random.default_rng(0)
    before = rng.normal(20.0, 1.0, (3, 80, 3)).round(2)
    moved = np.abs(before[..., 0] - before[..., 1])
    y = before[..., 0] - 0.3 * (before[..., 0] - before[..., 1]) + 0.1 * (moved + 0.005) * rng.standard_t(4, (3, 80))
    x = np.concatenate([before, rng.uniform(size=(3, 80, 1))], -1)
    tasks = bm.Tasks.from_arrays(list(x), list(y))
    fit = bm.fit(sensors.build(4), tasks, method=bm.Marginal(shared="map", chains=1), progress=False)
    weights, noise = fit.shared.mean("weights"), fit.shared.mean("noise")
    np.testing.assert_allclose(weights, np.r_[-0.3, np.zeros(6)], atol=0.05)
    assert noise[:2].sum() > 0.5 and np.abs(noise[2:]).max() < 0.5


@pytest.mark.parametrize("name", ["shared-process", "maml", "abml"])
def test_a_learner_of_each_kind_is_scored(name: str) -> None:
    """From an exact learner, from gradient steps, and from a posterior of weights."""
    suite = suites()["sin20"]()
    learned = learners.LEARNERS[name](suite, suite.training(5), budget=1e-3, seed=0)
    context, target = bm.families.DriftingSinusoids(context_rows=3, target_rows=4).episodes(3, seed=2)
    found = learned.predict(context, target, draws=20, seed=0)
    assert learned.parameters >= 0
    assert found.log_prob.shape == found.mean.shape == (3, 4) and found.draws.shape == (20, 3, 4)
    assert np.isfinite(found.log_prob).all() and np.isfinite(found.draws).all()
