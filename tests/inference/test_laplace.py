"""Modes that are there and modes that are not, handed from θ to θ, and mixtures as proposals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from one_dimensional import COUNTS, SQUARES, conditional, density, guides, make_tasks, moments, theta_draws
from scenarios import make_tasks as mixed_tasks
from scenarios import outliers, supports
from scipy.integrate import quad

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.derivatives import curvature
from bayesmeta.inference import laplace
from bayesmeta.inference.laplace import (
    ANCHORS,
    LaplaceGuide,
    MixtureTasks,
    distinct_modes,
    modes_at,
    modes_of,
    most_typical,
    spread_out,
)
from bayesmeta.inference.weighing import weigh_known


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def curved(function: object) -> object:
    return lambda z: tuple(part.detach() for part in curvature(function, 0, z))  # type: ignore[arg-type]


def bumps(places: list[float], heights: list[float]) -> object:
    centre, height = torch.tensor(places, dtype=torch.float64), torch.tensor(heights, dtype=torch.float64)
    return lambda z: (height.log() - 0.5 * ((z - centre) / 0.3).square()).logsumexp(-1)


def test_modes_that_differ_are_kept_and_equal_ones_merged() -> None:
    starts = torch.tensor([-2.2, -1.9, 0.1, 2.1, 1.8, 2.0], dtype=torch.float64)[:, None, None].expand(-1, 2, 1)
    function = bumps([-2.0, 2.0, 0.0], [1.0, 3.0, 1e-6])
    found, there = distinct_modes(curved(function), starts)  # type: ignore[arg-type]
    assert there.tolist() == [[True, True]] * 2
    np.testing.assert_allclose(found.loc[:, 0, 0], [2.0, -2.0], atol=1e-6)
    one, only = distinct_modes(curved(bumps([0.0], [1.0])), starts)  # type: ignore[arg-type]
    assert only.tolist() == [[True, True]] and abs(float(one.loc[0, 0, 0])) < 1e-6


def test_counts_and_heights_of_modes() -> None:
    """Squares have two modes at mu = 0, counts one; a task without a bend at 0 has one again."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert modes_of(density("squares"), make_tasks(SQUARES), zero)[1].sum(0).tolist() == [2, 2, 2]
    rows = {"x": [0.0, 0.1], "y": [2.5]}
    found, there = modes_of(density("squares"), make_tasks(rows), zero)
    assert there.sum(0).tolist() == [1, 2]
    read, tasks = density("squares"), make_tasks(rows)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64).reshape(-1, 1, 1).expand(-1, 2, 1)
    data, values = read.tensors(tasks.batch([0, 1])), dict(read.learned.values)
    along = read.log_task.mapped(zero.expand(6001, 1), grid, data, values, in_dims=(0, 0, None, None))
    np.testing.assert_allclose(found.value[0], along.amax(0), atol=1e-4)
    assert modes_of(density("counts"), make_tasks(COUNTS), zero)[1].sum(0).tolist() == [1] * 5


def test_a_mode_is_handed_from_anchor_to_anchor() -> None:
    """Without further starts only the anchors on one side would see the other mode; its evidence is right at each."""
    theta = theta_draws("squares", SQUARES, 500)
    guide = LaplaceGuide.around(theta, starts=3)
    guide.attach(density("squares"), make_tasks(SQUARES))
    batch = make_tasks(SQUARES).batch([0, 1, 2])
    context = guide.prepare(batch, density("squares").tensors(batch))
    share = context.summary["log_share"]
    near = guide.anchors[:, 0].abs() < 0.8
    assert share.shape[0] == 2 and bool((share[:, near] > -math.inf).all())
    for at in np.flatnonzero(near.numpy())[::5]:
        mu = float(guide.anchors[at, 0])
        sides = [
            quad(lambda z, mu=mu: math.exp(log_square(mu, z)), a, b, points=[-mu - 0.15 + s])[0]
            for a, b, s in ((-9.0, -mu - 0.15, -1.5), (-mu - 0.15, 9.0, 1.5))
        ]
        positive = context.summary["loc"][:, at, 0, 0] > -mu - 0.15
        found = share[:, at, 0].exp()[positive].sum()
        assert abs(float(found) - sides[1] / sum(sides)) < 0.03


def log_square(mu: float, z: float) -> float:
    rows = [(y - (mu + z + 0.15) ** 2) / 0.6 for y in SQUARES["p"]]
    return -0.5 * z * z - 0.5 * sum(r * r for r in rows)


def test_weights_of_two_modes_at_one_theta() -> None:
    """Proposals from the mixture, weighed, give both modes their share; from one of them they would not."""
    mu = float(np.linspace(-7, 7, 561)[300])
    theta = torch.full((4000, 1), mu, dtype=torch.float64)
    guide = LaplaceGuide.around(theta)
    guide.attach(density("squares"), make_tasks(SQUARES))
    drawn = weigh_known(density("squares"), guides(guide), theta, make_tasks(SQUARES))
    for place, y in enumerate(SQUARES.values()):
        mean, variance = (part[300] for part in conditional("squares", y))
        found = moments("squares", drawn, place)
        assert abs(found[0] - mean) < 4 * math.sqrt(variance / 4000) and drawn.flag[place] == ""
        assert drawn.khat[place] < 0.7 and drawn.ess[place] > 0.5


def test_a_mixture_is_a_density_and_its_draws_follow_it() -> None:
    from bayesmeta.inference.gaussian import GaussianTasks

    shape = (20_000, 1, 1)
    parts = [
        GaussianTasks(torch.full(shape, m).double(), torch.full((*shape, 1), s).double()) for m, s in ((-3, 2), (1, 1))
    ]
    share = torch.tensor([0.3, 0.7], dtype=torch.float64).log()[:, None, None].expand(2, 20_000, 1)
    mixture = MixtureTasks(parts, share)
    for heavy in (False, True):
        grid = torch.linspace(-60, 60, 20_000, dtype=torch.float64)[:, None, None]
        assert float(mixture.log_prob(grid, heavy=heavy).exp().sum() * 120 / 19_999) == pytest.approx(1, abs=2e-3)
        draws = mixture.sample(heavy=heavy)
        left = float((draws < -1.5).double().mean())
        right = (
            float((mixture.log_prob(grid, heavy=heavy).exp()[:, 0] * (grid[:, 0, 0] < -1.5).double()).sum())
            * 120
            / 19_999
        )
        assert abs(left - right) < 4 * math.sqrt(0.25 / 20_000)


def test_anchors_leave_no_draw_far_away() -> None:
    theta = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    anchors = spread_out(theta, ANCHORS)
    assert anchors.shape == (ANCHORS, 2) and torch.equal(anchors[0], most_typical(theta))
    even = theta[torch.linspace(0, 999, ANCHORS).long()]
    reach = [float(torch.cdist(theta, some).amin(1).max()) for some in (anchors, even)]
    assert reach[0] < 0.75 * reach[1]
    assert spread_out(theta[:3], ANCHORS).unique(dim=0).shape == (3, 2)
    assert spread_out(torch.ones(100, 2), ANCHORS).eq(1).all() and spread_out(torch.ones(100, 0), ANCHORS).shape[1] == 0


def test_nearness_does_not_depend_on_where_zero_is() -> None:
    """θ a million sds from 0: each draw still takes the anchor at its side."""
    anchors = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None] * 1e-3
    guide = LaplaceGuide(anchors + 1e6, torch.tensor([1e-3], dtype=torch.float64))
    assert guide.nearest(anchors + 1e6).tolist() == list(range(30))


def test_modes_of_a_model_with_every_kind_of_support() -> None:
    """Ten parameters, five of them with approximate whitening: found from every start, at every θ alike."""
    tasks = mixed_tasks()[np.array([0, 1, 3])]
    read = TaskDensity(supports, tasks)
    theta = 0.2 * torch.randn(2, read.structure.shared_size, dtype=torch.float64)
    begin = torch.randn(3, 2, 3, read.structure.task_size, dtype=torch.float64)
    found, there = modes_at(read, read.tensors(tasks.batch([0, 1, 2])), theta, begin)
    assert bool(found.converged[0].all()) and bool(there[0].all())


def test_at_a_point_estimate_modes_are_looked_for_once() -> None:
    """64 equal draws of θ: one anchor counts, from twice as many starts; shares are those of a search at several θ."""
    read, tasks = density("squares"), make_tasks(SQUARES)
    batch = tasks.batch([0, 1, 2])
    theta = torch.full((1, 1), 0.2, dtype=torch.float64)
    found = []
    for anchors in (theta.expand(100, 1), torch.cat([theta.expand(99, 1), theta + 1e-9])):
        guide = LaplaceGuide.around(anchors)
        guide.attach(read, tasks)
        context = guide.prepare(batch, read.tensors(batch))
        found.append((context.summary, guide.condition(theta.expand(5, 1), context)))
    assert found[0][0]["loc"].shape[1] == 1 and found[1][0]["loc"].shape[1] == ANCHORS
    (_, one), (_, many) = found
    assert isinstance(one, MixtureTasks) and one.log_share.shape == (2, 5, 3)
    noise = torch.linspace(-3, 3, 5, dtype=torch.float64)[:, None, None].expand(5, 3, 1)
    torch.testing.assert_close(one.log_prob(noise), many.log_prob(noise), atol=1e-5, rtol=1e-5)


def places(density: TaskDensity, tasks: Tasks) -> torch.Tensor:
    """What `LaplaceGuide` finds where nothing is shared, in units of a prior sd `(m, T, d)`."""
    guide = LaplaceGuide.around(torch.zeros(ANCHORS, 0, dtype=torch.float64))
    guide.attach(density, tasks)
    batch = tasks.batch(slice(None))
    return guide.prepare(batch, density.tensors(batch)).summary["loc"][:, 0]


def test_a_narrow_mode_in_the_tail_of_the_prior_is_looked_for_where_nothing_is_shared() -> None:
    """Rows around 9.5 or 12, 3.2 or 4 prior sds out: of 64 starts one in five tasks gets to the first, none further."""
    torch.manual_seed(0)
    rows = np.array([9.31, 9.64, 9.83, 9.57, 9.35])
    tasks = Tasks.from_arrays(None, [rows] * 30 + [rows + 2.5] * 30)
    found = (3 * places(TaskDensity(outliers, tasks), tasks)[..., 0] - torch.tensor([9.54] * 30 + [12.04] * 30)).abs()
    assert (found.amin(0) < 0.2).double().reshape(2, 30).mean(1).min() > 0.9


def test_a_search_in_pieces_finds_what_a_whole_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks.from_arrays(None, [[1.0, 1.1, 0.9, 8.0], [-2.0, -2.1], [0.3]] * 7)
    monkeypatch.setattr(laplace, "LARGEST", 513 * 4 * 5)
    model = TaskDensity(outliers, tasks)
    pieces = places(model, tasks)
    monkeypatch.undo()
    assert pieces.shape[1] == 21
    torch.testing.assert_close(pieces[0], places(model, tasks)[0], atol=1e-5, rtol=1e-5)
