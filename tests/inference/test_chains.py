"""The last rung against known posteriors: one chain a θ for known tasks, pairs (θ, φ) for new ones."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, TAU, conditional, exact, make_tasks, setting
from one_dimensional import SQUARES, agrees, answer, counts, density, guides, moments, theta_draws
from one_dimensional import make_tasks as one_tasks
from scenarios import outliers
from scipy.special import gammaln
from scipy.stats import gamma, norm

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import chains
from bayesmeta.inference.chains import UNSETTLED, move_known, move_new
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.weighing import TaskDraws

DRAWS = 3000


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def mu_draws() -> torch.Tensor:
    mean, covariance = exact(ROWS)
    even = norm.ppf((np.arange(DRAWS) + 0.5) / DRAWS)
    draws = np.random.default_rng(1).permutation(mean[-1] + covariance[-1, -1] ** 0.5 * even)
    return torch.as_tensor(draws).unsqueeze(1)


def placed(parts: Any, count: int) -> list[tuple[TaskDraws, int]]:
    found = {int(task): (drawn, column) for index, drawn in parts for column, task in enumerate(index)}
    return [found[task] for task in range(count)]


def test_known_tasks_given_each_theta() -> None:
    """Draw s belongs to θ_s: what is left of it after the conditional mean is standard and uncorrelated with θ."""
    read, learned, tasks = setting(ROWS)
    theta = mu_draws()
    parts = move_known(read, learned, theta, tasks, torch.randn(DRAWS, 5, 1, dtype=torch.float64))
    mean, sd = conditional(ROWS, theta[:, 0].numpy())
    for i, (drawn, column) in enumerate(placed(parts, 5)):
        a = (drawn.theta[:, 0] + TAU * drawn.noise[:, column, 0]).numpy()
        rest = (a - mean[:, i]) / sd[i]
        assert agrees((float(rest.mean()), float(rest.std())), (0.0, 1.0), DRAWS)
        assert abs(np.corrcoef(rest, theta[:, 0])[0, 1]) < 4 / math.sqrt(DRAWS)
        assert drawn.joint and drawn.method[column] == "nuts" and drawn.flag[column] == ""
        assert math.isnan(drawn.khat[column]) and torch.equal(drawn.theta, theta)


def test_new_tasks_move_theta_too() -> None:
    read, learned, _ = setting(ROWS)
    rows = {"new": [4.0], "far": [4.5, 3.5, 4.0]}
    parts = move_new(read, learned, mu_draws(), make_tasks(rows), torch.zeros(DRAWS, 2, dtype=torch.float64))
    for (drawn, column), (name, y) in zip(placed(parts, 2), rows.items(), strict=True):
        mean, covariance = exact(ROWS | {name: y})
        a, mu = drawn.theta[:, 0] + TAU * drawn.noise[:, column, 0], drawn.theta[:, 0]
        effective = DRAWS * drawn.ess[column] / 2
        assert agrees((float(a.mean()), float(a.std())), (mean[-2], covariance[-2, -2] ** 0.5), effective)
        assert agrees((float(mu.mean()), float(mu.std())), (mean[-1], covariance[-1, -1] ** 0.5), effective)
        assert not agrees((exact(ROWS)[0][-1], 1.0), (mean[-1], 1.0), effective)
        assert not drawn.joint and drawn.flag[column] == ""


def test_weights_of_theta_come_first() -> None:
    """The evidence of a task that is replaced is taken out before the new rows come in."""
    from conjugate import evidence

    read, learned, _ = setting(ROWS)
    theta, now = mu_draws(), {"c": [-1.0, -0.5]}
    weight = -torch.as_tensor(evidence({"c": ROWS["c"]}, theta[:, 0].numpy()))
    ((drawn, column),) = placed(move_new(read, learned, theta, make_tasks(now), weight), 1)
    mean, covariance = exact({name: y for name, y in ROWS.items() if name != "c"} | now)
    mu, sd = drawn.theta[:, 0], covariance[-1, -1] ** 0.5
    effective = DRAWS * drawn.ess[column] / 4
    assert agrees((float(mu.mean()), float(mu.std())), (mean[-1], sd), effective)
    assert not agrees((exact(ROWS | {"n": now["c"]})[0][-1], sd), (mean[-1], sd), effective)


def test_two_modes_of_a_new_task() -> None:
    theta = theta_draws("squares", SQUARES, DRAWS)
    rows = {"n": [2.5, 2.2], "o": [3.0]}
    parts = move_new(density("squares"), guides(), theta, one_tasks(rows), torch.zeros(DRAWS, 2, dtype=torch.float64))
    for (drawn, column), (name, y) in zip(placed(parts, 2), rows.items(), strict=True):
        right = answer("squares", SQUARES | {name: y}, y)
        assert agrees(moments("squares", drawn, column), right, DRAWS * drawn.ess[column] / 4)


def rates(batch: Batch) -> None:
    """A gamma prior: whitened by its moments only, its noise is not standard normal."""
    shape = pyro.sample("shape", dist.Gamma(4.0, 4.0))
    with batch.tasks():
        rate = pyro.sample("rate", dist.Gamma(shape, 0.5))
        with batch.observations():
            pyro.sample("y", dist.Poisson(rate), obs=batch.y)


def test_a_prior_that_is_whitened_by_its_moments() -> None:
    """At one θ the posterior is a gamma distribution, for known and new tasks alike."""
    rows = {"a": [0.0, 1.0], "b": [4.0], "c": [0.0]}
    tasks = one_tasks(rows)
    read = TaskDensity(rates, tasks)
    learned = Guides(guides().shared, guides().task, dict(read.learned.values))
    theta = read.theta_of({"shape": 0.7}).expand(DRAWS, 1)
    flat = torch.zeros(DRAWS, 3, dtype=torch.float64)
    start = torch.randn(DRAWS, 3, 1, dtype=torch.float64)
    for parts in (move_new(read, learned, theta, tasks, flat), move_known(read, learned, theta, tasks, start)):
        for (drawn, column), (place, y) in zip(placed(parts, 3), enumerate(rows.values()), strict=True):
            batch = tasks.batch([place])
            rate = read.constrain.mapped(
                theta, drawn.noise[:, column : column + 1], read.tensors(batch), {}, in_dims=(0, 0, None, None)
            )["rate"][:, 0]
            right = gamma(0.7 + sum(y), scale=1 / (0.5 + len(y)))
            inside = np.array([right.cdf(float(v)) for v in rate])
            assert drawn.flag[column] == ""
            assert agrees((float(inside.mean()), float(inside.std())), (0.5, 12**-0.5), DRAWS * drawn.ess[column] / 3)


def test_more_tasks_than_move_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of three sizes in chunks of two: each gets its own draws, padded places are dropped."""
    monkeypatch.setattr(chains, "TOGETHER", 2)
    rows = {f"t{i}": [float(i)] * (1 + 3 * (i % 3)) for i in range(7)}
    read, learned, _ = setting(ROWS)
    theta = mu_draws()[:500]
    mean, sd = conditional(rows, theta[:, 0].numpy())
    known = move_known(read, learned, theta, make_tasks(rows), torch.randn(500, 7, 1, dtype=torch.float64))
    new = move_new(read, learned, theta * 0 + 1.0, make_tasks(rows), torch.zeros(500, 7, dtype=torch.float64))
    alone, _ = conditional(rows, np.array(1.0))
    for i in range(7):
        drawn, column = placed(known, 7)[i]
        a = (drawn.theta[:, 0] + drawn.noise[:, column, 0]).numpy()
        assert abs((a - mean[:, i]).mean()) < 4 * sd[i] / math.sqrt(500)
        drawn, column = placed(new, 7)[i]
        a = (drawn.theta[:, 0] + drawn.noise[:, column, 0]).numpy()
        assert abs(a.mean() - alone[i]) < 4 * 1.5 * sd[i] / math.sqrt(500)


def test_big_data_move_in_smaller_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    real = chains.task_chunks

    def watched(tasks: Tasks, *, limit: int, **options: Any) -> Any:
        limits.append(limit)
        return real(tasks, limit=limit, **options)

    monkeypatch.setattr(chains, "task_chunks", watched)
    read, learned, tasks = setting(ROWS)
    for largest in (chains.LARGEST, 3000, 10):
        monkeypatch.setattr(chains, "LARGEST", largest)
        move_new(read, learned, mu_draws()[:50], tasks, torch.zeros(50, 5, dtype=torch.float64))
    assert limits[0] == chains.TOGETHER > limits[1] > limits[2] == 1


def test_too_few_theta_left_is_said() -> None:
    """Tasks far from what θ was: their chains settle, but the nearer one alone keeps enough draws of θ."""
    read, learned, _ = setting(ROWS)
    tasks = make_tasks({"near": [3.5] * 30, "far": [7.5] * 30})
    parts = move_new(read, learned, mu_draws()[:1000], tasks, torch.zeros(1000, 2).double())
    (near, _), (far, _) = placed(parts, 2)
    assert near.flag == [""] and 0.1 < near.ess[0] < 0.25
    assert far.flag == [UNSETTLED] and far.ess[0] < 0.1


def neck(batch: Batch) -> None:
    """A noise sd of each task: of two rows that are nearly the same it is uniform on the log scale, down to nothing."""
    with batch.tasks():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(mean, scale), obs=batch.y)


def test_a_neck_that_no_particle_reaches_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = one_tasks({"neck": [0.3, 0.30001], "wide": [0.3, 0.9]})
    read, theta = TaskDensity(neck, tasks), torch.zeros(1000, 0, dtype=torch.float64)
    flags = [
        [drawn.flag[column] for drawn, column in placed(inferred, 2)]
        for slack in (chains.SLACK, math.inf)
        for inferred in [with_slack(monkeypatch, slack, read, theta, tasks)]
    ]
    assert flags == [[UNSETTLED, ""], ["", ""]]


def with_slack(
    monkeypatch: pytest.MonkeyPatch, slack: float, read: TaskDensity, theta: torch.Tensor, tasks: Any
) -> Any:
    monkeypatch.setattr(chains, "SLACK", slack)
    torch.manual_seed(0)
    return move_new(read, guides(), theta, tasks, torch.zeros(1000, 2).double())


def test_a_mode_that_particles_come_upon_late_is_said() -> None:
    """Rows around 9.5, 3.2 prior sds out, where all of the mass is: tasks with few particles there are flagged."""
    rows = [9.31, 9.64, 9.83, 9.57, 9.35]
    tasks = one_tasks({str(place): rows for place in range(16)})
    read, theta = TaskDensity(outliers, tasks), torch.zeros(400, 0, dtype=torch.float64)
    parts = move_new(read, guides(), theta, tasks, torch.zeros(400, 16, dtype=torch.float64))
    share = [float(((3 * drawn.noise[:, c] - 9.54).abs() < 1).double().mean()) for drawn, c in placed(parts, 16)]
    flags = [drawn.flag[c] for drawn, c in placed(parts, 16)]
    assert any(some < 0.5 for some in share), "the test would not see what follows"
    assert all(flag for flag, some in zip(flags, share, strict=True) if some < 0.5)
    assert any(not flag for flag, some in zip(flags, share, strict=True) if some > 0.9)


def flat_tops(batch: Batch) -> None:
    """Posteriors that are flat where they are highest: Laplace's evidence is 2.6 nats too much."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 3.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi.square(), 0.5), obs=batch.y)


def scaled_prior(batch: Batch) -> None:
    """A prior that counts for a tenth."""
    with batch.tasks():
        with pyro.poutine.scale(scale=0.1):
            phi = pyro.sample("phi", dist.Normal(0.0, 10.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, 2.0), obs=batch.y)


@pytest.mark.parametrize("model", [flat_tops, scaled_prior])
def test_right_particles_are_not_doubted(model: Any) -> None:
    rows = {"a": [0.1, -0.2, 0.05, 0.3, -0.1], "b": [0.0, 0.1, -0.3, 0.2, 0.05]}
    tasks, draws = one_tasks(rows), 1000
    read, theta = TaskDensity(model, tasks), torch.zeros(draws, 0, dtype=torch.float64)
    parts = move_new(read, guides(), theta, tasks, torch.zeros(draws, 2, dtype=torch.float64))
    grid = np.linspace(-12, 12, 24_001)
    for (drawn, column), y in zip(placed(parts, 2), rows.values(), strict=True):
        assert drawn.flag[column] == ""
        loc, noise, unit, power = (grid**2, 0.5, 3.0, 1.0) if model is flat_tops else (grid, 2.0, 10.0, 0.1)
        log_p = -0.5 * power * (grid / unit) ** 2 + norm.logpdf(np.array(y)[:, None], loc, noise).sum(0)
        weight = np.exp(log_p - log_p.max())
        sd = math.sqrt((weight * grid**2).sum() / weight.sum() - ((weight * grid).sum() / weight.sum()) ** 2)
        assert float(unit * drawn.noise[:, column].std()) == pytest.approx(sd, rel=0.15)


def test_theta_is_weighed_where_the_prior_is_whitened_by_its_moments() -> None:
    """The shape of a gamma prior after one more task; its evidence is a negative binomial's."""
    rows = {"n": [9.0, 14.0, 11.0]}
    tasks = one_tasks(rows)
    read = TaskDensity(rates, tasks)
    shapes = np.random.default_rng(0).permutation(np.linspace(0.3, 6.0, DRAWS))
    theta = torch.as_tensor(np.log(shapes)).unsqueeze(1)
    assert float(read.shared_values(theta[:1])["shape"]) == pytest.approx(shapes[0])
    learned = Guides(guides().shared, guides().task, dict(read.learned.values))
    ((drawn, column),) = placed(move_new(read, learned, theta, tasks, torch.zeros(DRAWS, 1).double()), 1)
    total, count = sum(rows["n"]), len(rows["n"])
    weight = np.exp(gammaln(shapes + total) - gammaln(shapes) + shapes * np.log(0.5 / (0.5 + count)))
    weight /= weight.sum()
    mean = weight @ shapes
    found = drawn.theta[:, 0].exp()
    right = (mean, math.sqrt(weight @ (shapes - mean) ** 2))
    assert agrees((float(found.mean()), float(found.std())), right, DRAWS * drawn.ess[column] / 2)
    assert not agrees((3.15, 1.0), right, DRAWS * drawn.ess[column] / 2)


@pytest.mark.parametrize("model", [counts, rates])
def test_powers_lead_from_the_prior_to_the_joint(model: Any) -> None:
    """Value and slope of the target at powers 0, ½ and 1, for priors that are normal in the noise and that are not."""
    tasks = one_tasks({"a": [2.0, 1.0], "b": [4.0, 0.0]})
    read = TaskDensity(model, tasks)
    data, theta = read.tensors(tasks.batch([0, 1])), 0.3 * torch.randn(3, 1, dtype=torch.float64)
    population = chains._Population(read, guides(), theta, data)
    pairs = torch.tensor([[0, 2], [1, 1], [2, 1]])
    noise = torch.randn(3, 2, 1, dtype=torch.float64)
    for power in (0.0, 0.5, 1.0):
        value, slope = population.target(pairs, torch.full((2,), power, dtype=torch.float64))(noise)
        for s, task in itertools.product(range(3), range(2)):
            part = read.tensors(tasks.batch([task]))
            joint = functools.partial(powered, read, theta[pairs[s, task]], part, power)
            with torch.enable_grad():
                point = noise[s, task].clone().requires_grad_()
                (right,) = torch.autograd.grad(joint(point), point)
            torch.testing.assert_close(slope[s, task], right)
            moved = noise.clone()
            moved[s, task] = 0.7
            rise = population.target(pairs, torch.full((2,), power).double())(moved)[0] - value
            torch.testing.assert_close(rise[s, task], joint(moved[s, task]) - joint(noise[s, task]))


def powered(read: TaskDensity, theta: torch.Tensor, data: Any, power: float, noise: torch.Tensor) -> torch.Tensor:
    """Log prior and so much of the log likelihood of one task."""
    prior, rows = read.log_parts(theta, noise.unsqueeze(0), data, {})
    return (prior + power * rows).sum()


def test_coupled_rows_count_by_their_covariances() -> None:
    """Of tasks of 3 and 40 rows the largest counts: y, masks and the like, and the matrices of coupled rows."""
    tasks = one_tasks({"a": [1, 0, 2], "b": [1] * 40})
    apart, coupled = (chains._elements(tasks, coupled) for coupled in (False, True))
    assert 3 * 40 < apart < 10 * 40 and coupled - apart == chains.COVARIANCES * 40**2
