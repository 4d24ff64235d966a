"""Each rung against quadrature over (θ, φ), what climbs and what does not, pairing across rungs, the audit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, drawn_rows, exact, setting
from conjugate import ExactGuide as Conjugate
from conjugate import make_tasks as normal_tasks
from one_dimensional import (
    COUNTS,
    SQUARES,
    Missing,
    agrees,
    answer,
    conditional,
    density,
    guides,
    log_theta,
    make_tasks,
    moments,
    phi_draws,
    plugged_in,
    theta_draws,
)
from scipy.stats import chi2
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference import ladder
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.ladder import climb
from bayesmeta.inference.protocols import Context
from bayesmeta.inference.weighing import Parts, TaskDraws
from benchmarks.awkward_known import small_noise

DRAWS = 4000


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def placed(parts: Parts, count: int) -> list[tuple[TaskDraws, int]]:
    """The part and column of each task; every task is in one part."""
    found = {int(task): (drawn, column) for index, drawn in parts for column, task in enumerate(index)}
    assert sorted(found) == list(range(count)) and sum(len(index) for index, _ in parts) == count
    return [found[task] for task in range(count)]


def methods(parts: Parts, count: int) -> list[str]:
    return [drawn.method[column] for drawn, column in placed(parts, count)]


@pytest.mark.parametrize(("refine", "method"), [("auto", "laplace"), ("laplace", "laplace"), ("nuts", "nuts")])
def test_known_tasks_that_the_guide_misses(refine: str, method: str) -> None:
    """A guess of mu alone would be seen in one task at least, and so would the guide's own draws in all."""
    theta = theta_draws("counts", COUNTS, DRAWS)
    parts = climb(density("counts"), guides(), theta, make_tasks(COUNTS), known=True, refine=refine)
    tell = 0
    for (drawn, column), y in zip(placed(parts, 5), COUNTS.values(), strict=True):
        assert drawn.flag[column] == "" and drawn.method[column] == method and drawn.joint
        right = answer("counts", COUNTS, y)
        assert agrees(moments("counts", drawn, column), right, DRAWS)
        tell += not agrees(plugged_in("counts", COUNTS, y), right, DRAWS)
    assert tell >= 4
    unchecked = climb(density("counts"), guides(), theta, make_tasks(COUNTS), known=True, refine="none")
    for (drawn, column), y in zip(placed(unchecked, 5), COUNTS.values(), strict=True):
        assert drawn.flag[column].startswith("not checked")
        assert not agrees(moments("counts", drawn, column), answer("counts", COUNTS, y), DRAWS)


@pytest.mark.parametrize(("refine", "method"), [("auto", "laplace"), ("laplace", "laplace"), ("nuts", "nuts")])
def test_new_tasks_that_the_guide_misses(refine: str, method: str) -> None:
    new = {"n": [5.0, 3.0], "m": [0.0]}
    theta = theta_draws("counts", COUNTS, DRAWS)
    parts = climb(density("counts"), guides(), theta, make_tasks(new), known=False, refine=refine)
    for (drawn, column), (name, y) in zip(placed(parts, 2), new.items(), strict=True):
        assert drawn.flag[column] == "" and drawn.method[column] == method and not drawn.joint
        right = answer("counts", COUNTS | {name: y}, y)
        assert agrees(moments("counts", drawn, column), right, DRAWS * drawn.ess[column] / 2)
        assert not agrees(plugged_in("counts", COUNTS, y), right, DRAWS * drawn.ess[column] / 2)


@pytest.mark.parametrize("refine", ["none", "auto", "laplace", "nuts"])
def test_a_replaced_task_on_every_rung(refine: str) -> None:
    """With refine="none" the guide is weighed all the same: a fair one. Did θ keep the old rows, it would show."""
    now = {"c": [2.0, 1.0, 3.0]}
    rest = {name: y for name, y in COUNTS.items() if name != "c"}
    theta = theta_draws("counts", COUNTS, DRAWS)
    fair = ladder.LaplaceGuide.around(theta)
    fair.attach(density("counts"), make_tasks(now))
    learned = guides(fair if refine == "none" else None)
    old = make_tasks({"c": COUNTS["c"]})
    parts = climb(density("counts"), learned, theta, make_tasks(now), known=False, refine=refine, replaced=old)
    ((drawn, column),) = placed(parts, 1)
    right, kept = answer("counts", rest | now, now["c"]), answer("counts", COUNTS | {"new": now["c"]}, now["c"])
    assert drawn.flag[column] == ""
    assert agrees(moments("counts", drawn, column), right, DRAWS * drawn.ess[column] / 4)
    assert not agrees(kept, right, DRAWS * drawn.ess[column] / 4)


def test_gaussian_tasks_are_answered_in_closed_form() -> None:
    model, learned, tasks = setting(ROWS)
    learned.task = Conjugate(shift=-4.0, width=0.05)
    mean, covariance = exact(ROWS)
    theta = mean[-1] + covariance[-1, -1] ** 0.5 * torch.randn(DRAWS, 1, dtype=torch.float64)
    parts = climb(model, learned, theta, tasks, known=True, refine="auto")
    assert methods(parts, 5) == ["exact"] * 5
    for i, (drawn, column) in enumerate(placed(parts, 5)):
        assert drawn.khat[column] == 0 and drawn.flag[column] == ""
        a = drawn.theta[:, 0] + drawn.noise[:, column, 0]
        assert agrees((float(a.mean()), float(a.std())), (mean[i], covariance[i, i] ** 0.5), DRAWS / 2)


class Chooser(Conjugate):
    """Misses the tasks whose first label says so."""

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:  # type: ignore[override]
        precision = 1 + context.batch.n * (1.0 / 0.8) ** 2
        sums = (context.batch.y * context.batch.mask).sum(-1) - context.batch.n * theta
        bad = (context.batch.y[:, 0] > 2.4).to(theta.dtype)
        loc = sums / 0.8**2 / precision - 5.0 * bad
        factor = 20.0 * bad + precision.sqrt().expand(loc.shape)
        return GaussianTasks(loc.unsqueeze(-1), factor[..., None, None])


def test_only_what_fails_climbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 tasks: the closed form is asked for those that fail, the audit looks at a twentieth of the others."""
    monkeypatch.setattr(ladder, "LEAST_AUDITED", 2)
    rows = drawn_rows(60, seed=5)
    model, learned, tasks = setting(rows)
    learned.task = Chooser()
    failing = [i for i, y in enumerate(rows.values()) if y[0] > 2.4]
    assert 3 <= len(failing) <= 25
    asked: dict[str, list[int]] = {"modes_of": [], "are_gaussian": []}
    for name, sizes in asked.items():
        real = getattr(ladder, name)

        def counted(
            read: object, some: object, *given: object, real: object = real, sizes: list[int] = sizes, **named: object
        ) -> object:
            sizes.append(len(some))  # type: ignore[arg-type]
            return real(read, some, *given, **named)  # type: ignore[operator]

        monkeypatch.setattr(ladder, name, counted)
    theta = exact(rows)[0][-1] + 0.1 * torch.randn(400, 1, dtype=torch.float64)
    parts = climb(model, learned, theta, tasks, known=True, refine="auto")
    assert methods(parts, 60) == ["exact" if i in failing else "psis" for i in range(60)]
    assert asked["are_gaussian"] == [len(failing)]
    assert asked["modes_of"] == [int(np.ceil(0.05 * (60 - len(failing))))]


class OneMissed(Missing):
    """Right for tasks of small counts, blind for the others."""

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:
        narrow = super().condition(theta, context)
        good = (context.batch.y[:, 0] < 3).unsqueeze(-1)
        loc = torch.where(good, -0.6 * torch.ones_like(narrow.loc), narrow.loc)
        factor = torch.where(good.unsqueeze(-1), 0.9 * torch.ones_like(narrow.factor), narrow.factor)
        return GaussianTasks(loc, factor)


def test_draws_stay_paired_across_rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sd of the difference of two tasks, one left on the first rung and one taken up to the chains."""
    monkeypatch.setattr(ladder._Climber, "laplace", lambda climber: climber_start(climber))
    theta = theta_draws("counts", COUNTS, DRAWS)
    parts = climb(density("counts"), guides(OneMissed()), theta, make_tasks(COUNTS), known=True, refine="auto")
    assert methods(parts, 5) == ["psis", "nuts", "psis", "nuts", "psis"]
    columns = []
    for drawn, column in placed(parts, 5):
        index = torch.as_tensor(drawn.index[:, column].copy())
        np.testing.assert_array_equal(drawn.theta[index], theta)
        columns.append(phi_draws("counts", drawn, column))
    given = [conditional("counts", y) for y in COUNTS.values()]
    weight = np.exp(log_theta("counts", COUNTS))
    tell = 0
    for i, j in ((0, 1), (2, 3), (4, 1)):
        (m, v), (n, u) = given[i], given[j]
        centre = weight @ (m - n)
        sd = np.sqrt(weight @ (v + u + (m - n - centre) ** 2))
        apart = np.hypot(columns[i].std(), columns[j].std())
        error = 4 * sd / np.sqrt(DRAWS)
        assert abs((columns[i] - columns[j]).std() - sd) < error
        tell += error < apart - sd
    assert tell >= 1


def climber_start(climber: ladder._Climber) -> None:
    """Weighs Laplace proposals, and trusts none of them."""
    positions = climber.found.open
    climber._weigh(climber._attached(ladder.LaplaceGuide.around(climber.theta)), positions)
    climber.found.doubt(positions)


class OneSide(Missing):
    """Fits the positive mode and passes every gate: half of the posterior is not there."""

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:
        narrow = super().condition(theta, context)
        root = ((context.batch.y * context.batch.mask).sum(-1) / context.batch.n).sqrt()
        loc = (root - 0.15 - theta).unsqueeze(-1)
        return GaussianTasks(loc, torch.full_like(narrow.factor, 6.0))


def test_a_second_mode_in_accepted_tasks_sends_all_of_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior's tenth of the proposals is taken away, so that k̂ is blind to the mode on the other side."""
    monkeypatch.setattr("bayesmeta.inference.candidates.SHARES", {"guide": 0.7, "heavy": 0.2999999, "prior": 1e-7})
    rows = {f"{name}{i}": y for i in range(4) for name, y in SQUARES.items()}
    theta = theta_draws("squares", SQUARES, 1000)
    left = guides(OneSide())
    monkeypatch.setattr(ladder._Climber, "audit", lambda climber: None)
    unaudited = climb(density("squares"), left, theta, make_tasks(rows), known=True, refine="auto")
    accepted = methods(unaudited, 12).count("psis")
    assert accepted >= 8
    monkeypatch.undo()
    monkeypatch.setattr("bayesmeta.inference.candidates.SHARES", {"guide": 0.7, "heavy": 0.2999999, "prior": 1e-7})
    audited = climb(density("squares"), left, theta, make_tasks(rows), known=True, refine="auto")
    assert methods(audited, 12).count("psis") == 0


class Shoulder(Missing):
    """Fits what lies beside the neck."""

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:
        covariance = torch.tensor([[0.476, 0.484], [0.484, 0.878]], dtype=theta.dtype)
        loc = torch.tensor([-2.042, -0.197], dtype=theta.dtype)
        shape = (len(theta), len(context.batch.names))
        return GaussianTasks(loc.expand(*shape, 2), torch.linalg.cholesky(covariance.inverse()).expand(*shape, 2, 2))


def test_a_neck_that_no_candidate_has_seen_is_missed() -> None:
    """Two rows that are nearly the same: half of the posterior lies where the sd is below .05, at a mode of its own."""
    tasks = bm.Tasks.from_arrays(None, [[-2.5376, -2.5389], [-2.5, -2.4, -3.4, -1.2]], names=["neck", "plain"])
    theta = torch.zeros(1000, 0, dtype=torch.float64)
    climber = ladder._Climber(TaskDensity(small_noise, tasks), guides(Shoulder()), theta, tasks, False, None)
    assert climber._modes(np.arange(2))[1].sum(0).tolist() == [1, 1]
    assert climber._missed(np.arange(2)).tolist() == [True, False]


def test_one_heavy_candidate_does_not_hide_a_neck() -> None:
    """On the neck's wall a candidate makes the evidence so large that the mode would seem to be negligible."""
    tasks = bm.Tasks.from_arrays(None, [[-2.5376, -2.5389]] * 400)
    theta = torch.zeros(200, 0, dtype=torch.float64)
    with seeded(1):
        climber = ladder._Climber(TaskDensity(small_noise, tasks[:2]), guides(Shoulder()), theta, tasks, False, None)
        climber.guide()
        accepted = climber.found.accepted
        assert len(accepted) > 20 and climber._missed(accepted).all()


@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_half_of_a_normal_distribution_is_central(size: int) -> None:
    value = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    quantile = torch.as_tensor(chi2.ppf(value.numpy(), size))
    torch.testing.assert_close(ladder._chi_square_cdf(quantile, size), value)


def test_the_audit_looks_at_some_tasks_then_at_all_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 32 at least; only tasks that are missed are doubted."""
    tasks = bm.Tasks.from_arrays(None, [[-2.5, -2.4, -3.4, -1.2]] * 100)
    theta = torch.zeros(200, 0, dtype=torch.float64)
    climber = ladder._Climber(TaskDensity(small_noise, tasks[:2]), guides(Shoulder()), theta, tasks, False, None)
    climber.guide()
    climber.found._doubt[:] = False
    seen: list[np.ndarray] = []

    def missed(_: ladder._Climber, positions: np.ndarray) -> np.ndarray:
        seen.append(positions)
        return np.arange(len(positions)) == 0

    monkeypatch.setattr(ladder._Climber, "_missed", missed)
    monkeypatch.setattr("bayesmeta.inference.weighing.BLOCK_NUMBERS", 20 * 512 * 4)
    climber.audit()
    assert [len(part) for part in seen] == [20, 12, 20, 20, 20, 8]
    assert sorted(np.concatenate(seen)) == list(range(100))
    assert climber.found.open.tolist() == sorted(part[0] for part in seen)


@pytest.mark.parametrize("known", [True, False])
def test_two_modes_have_their_weights(known: bool) -> None:
    theta = theta_draws("squares", SQUARES, DRAWS)
    rows = SQUARES if known else {"n": [2.5, 2.2]}
    parts = climb(density("squares"), guides(), theta, make_tasks(rows), known=known, refine="auto")
    for (drawn, column), (name, y) in zip(placed(parts, len(rows)), rows.items(), strict=True):
        right = answer("squares", SQUARES if known else SQUARES | {name: y}, y)
        assert drawn.flag[column] == "" and agrees(
            moments("squares", drawn, column), right, DRAWS * drawn.ess[column] / 2
        )


def test_chains_say_that_they_cannot_weigh_modes() -> None:
    theta = theta_draws("squares", SQUARES, 200)
    parts = climb(density("squares"), guides(), theta, make_tasks(SQUARES), known=True, refine="nuts")
    assert all("several modes" in drawn.flag[column] for drawn, column in placed(parts, 3))


def test_where_nothing_is_shared_chains_weigh_the_modes_of_known_tasks_too() -> None:
    def model(batch: bm.Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.2, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi.square(), 0.3), obs=batch.y)

    tasks = bm.Tasks.from_arrays(None, [[1.0, 1.2], [0.9, 1.4, 1.1]])
    read = TaskDensity(model, tasks)
    theta = torch.zeros(2000, 0, dtype=torch.float64)
    parts = climb(read, guides(), theta, tasks, known=True, refine="nuts")
    grid = np.linspace(-4, 4, 4001)
    for index, drawn in parts:
        for column, task in enumerate(index):
            y = tasks[int(task)].y.numpy()
            log_density = -0.5 * (grid - 0.2) ** 2 - ((y[:, None] - grid**2) ** 2).sum(0) / (2 * 0.3**2)
            weight = np.exp(log_density - log_density.max())
            mean = (weight * grid).sum() / weight.sum()
            phi = 0.2 + drawn.noise[:, column, 0].numpy()
            assert drawn.flag[column] == "" and drawn.joint
            assert abs(phi.mean() - mean) < 4 * phi.std() / math.sqrt(len(phi) / 4)
            assert 0.2 < (phi > 0).mean() < 0.95


def test_at_a_point_estimate_known_tasks_are_tempered_too() -> None:
    """One θ and two modes: their weights are known, while chains could not tell them."""
    theta = torch.full((1000, 1), 0.2, dtype=torch.float64)
    parts = climb(density("squares"), guides(), theta, make_tasks(SQUARES), known=True, refine="nuts")
    place = int(np.abs(np.linspace(-7, 7, 561) - 0.2).argmin())
    for (drawn, column), y in zip(placed(parts, 3), SQUARES.values(), strict=True):
        mean, variance = conditional("squares", y)
        assert drawn.flag[column] == "" and drawn.joint
        right = (mean[place], variance[place] ** 0.5)
        assert agrees(moments("squares", drawn, column), right, 1000 * drawn.ess[column] / 4)


def test_a_plug_in_theta_and_a_single_draw() -> None:
    """All draws of θ equal: the posterior at that θ; one draw: an answer, judged or flagged, without a crash."""
    theta = torch.full((1000, 1), 0.4, dtype=torch.float64)
    parts = climb(density("counts"), guides(), theta, make_tasks(COUNTS), known=False, refine="auto")
    place = int(np.abs(np.linspace(-7, 7, 561) - 0.4).argmin())
    for (drawn, column), y in zip(placed(parts, 5), COUNTS.values(), strict=True):
        mean, variance = conditional("counts", y)
        assert agrees(
            moments("counts", drawn, column), (mean[place], variance[place] ** 0.5), 1000 * drawn.ess[column] / 2
        )
    for known in (True, False):
        for refine in ("auto", "nuts"):
            parts = climb(density("counts"), guides(), theta[:1], make_tasks(COUNTS), known=known, refine=refine)
            assert all(bool(torch.isfinite(drawn.noise).all()) for drawn, _ in placed(parts, 5))


@pytest.mark.parametrize("refine", ["auto", "nuts"])
def test_same_seed_same_draws(refine: str, capfd: pytest.CaptureFixture[str]) -> None:
    theta = theta_draws("counts", COUNTS, 100)
    before = torch.get_rng_state()
    found = []
    for _ in range(2):
        with seeded(3):
            parts = climb(density("counts"), guides(), theta, make_tasks(COUNTS), known=False, refine=refine)
        found.append([drawn.noise[:, column].numpy() for drawn, column in placed(parts, 5)])
    np.testing.assert_array_equal(*found)
    assert torch.equal(before, torch.get_rng_state()) and capfd.readouterr() == ("", "")


def test_found_draws_are_owned_by_the_last_rung_alone() -> None:
    theta = theta_draws("counts", COUNTS, 50)
    tasks = normal_tasks({"x": [1.0], "y": [2.0], "z": [0.5]})
    model, learned, _ = setting(ROWS)
    parts = climb(model, learned, theta, tasks, known=True, refine="none")
    found = ladder._Found(3)
    found.put(parts, np.array([2, 0, 1]))
    assert found.open.tolist() == [0, 1, 2] and found.accepted.tolist() == []
    parts[0][1].flag = [""] * 3
    found.put([(np.array([0]), parts[0][1].of(np.array([True, False, False])))], np.array([1]))
    assert found.accepted.tolist() == [1] and found.open.tolist() == [0, 2]
    assert sorted(int(i) for index, _ in found.parts() for i in index) == [0, 1, 2]
    found.doubt(np.array([1]))
    assert found.open.tolist() == [0, 1, 2]


def test_laplace_proposals_of_a_new_task_are_judged_by_enough_weights() -> None:
    """Asked for 200 draws, k̂ is that of 1,000 weights at 200 θ, and the answer is right."""
    new = {"new": [3.0, 5.0]}
    theta = theta_draws("counts", COUNTS, 200)
    ((_, drawn),) = climb(density("counts"), guides(), theta, make_tasks(new), known=False, refine="laplace")
    assert drawn.noise.shape[0] == ladder.JUDGED and len(drawn.theta.unique(dim=0)) == len(theta.unique(dim=0))
    right = answer("counts", COUNTS | new, new["new"])
    assert agrees(moments("counts", drawn, 0), right, 200 * drawn.ess[0] / 2)
