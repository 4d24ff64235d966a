"""The mode of θ and the normal around it, in a model where both are formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import ROWS, centre, exact, make_tasks
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.evidence import Evidence
from bayesmeta.inference.mode import Mode, _End, normal_at

pytestmark = pytest.mark.usefixtures("uncompiled")


def found(model: Any, rows: dict[str, Any]) -> Mode:
    tasks = make_tasks(rows)
    density = TaskDensity(model, tasks)
    mode = Mode(density, Evidence(density, tasks, kind="closed form"))
    mode.find()
    return mode


def test_mode_and_normal_of_a_gaussian_model_are_exact() -> None:
    mean, covariance = exact(ROWS)
    mode = found(centre, ROWS)
    assert float(mode.theta) == pytest.approx(mean[-1], abs=1e-6)
    loc, sd = mode.shared().centre()
    assert float(loc) == pytest.approx(mean[-1], abs=1e-6)
    assert float(sd) == pytest.approx(covariance[-1, -1] ** 0.5, rel=1e-6)


@pytest.mark.parametrize("unit", [1e-3, 1e4])
def test_flat_priors_and_any_unit(unit: float) -> None:
    """The mode of (mu, log tau, log sigma) moves with the unit, and the sds of the logarithms do not."""

    def flat(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        tau = pyro.sample("tau", dist.ImproperUniform(dist.constraints.positive, (), ()))
        sigma = pyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, tau))
            with batch.observations():
                pyro.sample("y", dist.Normal(a, sigma), obs=batch.y)

    base = found(flat, ROWS)
    other = found(flat, {name: unit * np.asarray(y) for name, y in ROWS.items()})
    shift = torch.tensor([0.0, math.log(unit), math.log(unit)], dtype=torch.float64)
    expected = torch.cat([unit * base.theta[:1], base.theta[1:] + shift[1:]])
    torch.testing.assert_close(other.theta, expected, rtol=1e-4, atol=1e-4 * unit if unit < 1 else 1e-4)
    scale = torch.tensor([unit, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(other.shared().centre()[1], scale * base.shared().centre()[1], rtol=1e-3, atol=0)


def test_another_start_where_the_density_is_not_finite_at_the_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = make_tasks(ROWS)
    density = TaskDensity(centre, tasks)
    evidence = Evidence(density, tasks, kind="closed form")
    mode = Mode(density, Holed(evidence, 0.0))  # type: ignore[arg-type]
    mode.find()
    assert float(mode.theta) == pytest.approx(exact(ROWS)[0][-1], abs=1e-5)


class Unimodal:
    """No task has a better mode."""

    modes: list[Tensor] = []

    def improve(self, theta: Tensor, values: Any) -> bool:
        return False


class Holed(Unimodal):
    """An evidence that is NaN within 1e-3 of a point."""

    def __init__(self, evidence: Evidence, hole: float) -> None:
        self._evidence, self._hole, self.values = evidence, hole, evidence.values

    def __call__(self, theta: Tensor, values: Any = ()) -> Any:
        value, gradient, others = self._evidence(theta, values)
        inside = abs(float(theta) - self._hole) < 1e-3
        return (
            (torch.full_like(value, math.nan), torch.zeros_like(gradient), others)
            if inside
            else (value, gradient, others)
        )


def test_a_density_that_is_never_finite_is_an_error() -> None:
    tasks = make_tasks(ROWS)
    density = TaskDensity(centre, tasks)

    class Nowhere(Holed):
        def __call__(self, theta: Tensor, values: Any = ()) -> Any:
            return torch.tensor(math.nan), torch.zeros_like(theta), []

    with pytest.raises(ValueError, match="no mode that Newton's steps find; check the data and the priors, or use"):
        Mode(density, Nowhere(Evidence(density, tasks, kind="closed form"), 0.0)).find()  # type: ignore[arg-type]


def test_a_normal_from_its_covariance() -> None:
    covariance = torch.tensor([[4.0, 1.2, 0.0], [1.2, 1.0, -0.3], [0.0, -0.3, 2.0]], dtype=torch.float64)
    loc = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    shared = normal_at(loc, covariance)
    torch.testing.assert_close(shared.factor() @ shared.factor().mT, covariance)
    truth = torch.distributions.MultivariateNormal(loc, covariance)
    at = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(shared.log_prob(at), truth.log_prob(at))


class Hills(Unimodal):
    """Two hills, the lower one at the prior's centre; beyond 6 the density cannot be had."""

    def __init__(self, weight: float = 0.0) -> None:
        self.values = {"weight": torch.tensor(weight, dtype=torch.float64)}

    def __call__(self, theta: Tensor, values: Any = ()) -> Any:
        (weight,) = values
        if float(theta.abs()) > 6:
            raise RuntimeError("a matrix is not positive definite")
        at, moved = theta.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            hills = torch.logaddexp(-0.5 * (at / 0.5) ** 2, 3 - 0.5 * ((at - 3) / 0.5) ** 2).sum()
            total = hills - (moved - theta.mean()) ** 2
            slopes = torch.autograd.grad(total, [at, moved])
        return total.detach(), slopes[0], [slopes[1]]


@pytest.mark.parametrize(("starts", "expected"), [(1, 0.0), (20, 3.0)])
def test_the_highest_of_several_climbs(starts: int, expected: float) -> None:
    torch.manual_seed(0)
    mode = Mode(TaskDensity(centre, make_tasks(ROWS)), Hills())  # type: ignore[arg-type]
    mode.find(starts=starts)
    assert float(mode.theta) == pytest.approx(expected, abs=0.01)
    assert float(mode.values["weight"]) == pytest.approx(expected, abs=0.01)


class Cliff(Unimodal):
    """A peak at 3, and a slope that leads from the prior's centre to where there is no gradient."""

    values: dict[str, Tensor] = {}

    def __call__(self, theta: Tensor, values: Any = ()) -> Any:
        at = theta.detach().requires_grad_()
        with torch.enable_grad():
            total = torch.where(at < 1, -at, -1 - 50 * ((at - 3) / 2) ** 2 + 50).sum()
            (slope,) = torch.autograd.grad(total, at)
        return total.detach(), torch.where(theta < -0.5, math.nan, slope), []


def test_another_start_where_a_search_ended_without_curvature() -> None:
    torch.manual_seed(0)
    mode = Mode(TaskDensity(centre, make_tasks(ROWS)), Cliff())  # type: ignore[arg-type]
    mode.find()
    assert float(mode.theta) == pytest.approx(3.0, abs=0.01)


class Tired(Mode):
    """Gives up at once at the first starts, as a line search does where rounding has taken the density's digits."""

    climbs, idle = 0, 2

    def _climb(self, unit: Tensor) -> None:
        self.climbs += 1
        if self.climbs > self.idle:
            super()._climb(unit)


@pytest.mark.parametrize("idle", [2, 4])
def test_another_start_where_a_search_ended_on_a_slope(idle: int) -> None:
    mean, _ = exact(ROWS)
    density = TaskDensity(centre, make_tasks(ROWS))
    mode = Tired(density, Evidence(density, make_tasks(ROWS), kind="closed form"))
    mode.idle = idle
    mode.find()
    assert mode.climbs == idle + 2
    assert float(mode.theta) == pytest.approx(mean[-1], abs=1e-6)


def ending(ends: list[tuple[float, float]], values: dict[str, Tensor] | None = None) -> Mode:
    """A search that ends in turn with these densities and slopes, each at a θ of its own."""
    density = TaskDensity(centre, make_tasks(ROWS))
    mode = Mode(density, Evidence(density, make_tasks(ROWS), kind="closed form"))
    left = iter(enumerate(ends))

    def settled(*, retried: bool) -> _End:
        k, (value, slope) = next(left)
        assert retried == (k > 0)
        return _End(value, slope, torch.full((1,), float(k)), values or {}, mode._last, mode._evidence.modes)

    first = _End(0.0, 0.0, mode.theta, values or {}, mode._last, mode._evidence.modes)
    mode._reached = lambda _: first  # type: ignore[method-assign]
    mode._settled = settled  # type: ignore[method-assign]
    return mode


def test_the_highest_slope_is_taken_where_there_is_no_mode_and_said() -> None:
    mode = ending([(-5.0, 3.0), (-2.0, 2.0), (-math.inf, math.nan), (-9.0, 0.7), (-3.0, 9.0), (-4.0, 1.0)])
    with pytest.warns(UserWarning, match=r"ended on a slope, of 2\.0 in units .* from 6 starts"):
        mode.find()
    assert float(mode.theta) == 1


def test_a_mode_below_a_slope_is_not_the_end() -> None:
    mode = ending([(9.0, 0.6), (-20.0, 0.1), (10.0, 0.1)])
    mode.find()
    assert float(mode.theta) == 2
    mode = ending([(-20.0, 9.0), (9.0, 0.1)])
    mode.find()
    assert float(mode.theta) == 1


def test_weights_that_are_trained_along_need_not_be_done() -> None:
    mode = ending([(0.0, 10.0)], {"weight": torch.zeros(1)})
    mode.find()
    assert float(mode.theta) == 0


def test_a_retry_that_breaks_is_passed_over_and_the_first_start_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    density = TaskDensity(centre, make_tasks(ROWS))
    mode = Mode(density, Evidence(density, make_tasks(ROWS), kind="closed form"))

    def broken() -> Tensor:
        raise RuntimeError("not positive definite")

    monkeypatch.setattr(mode, "_half", broken)
    assert mode._settled(retried=True).value == -math.inf
    with pytest.raises(RuntimeError, match="not positive definite"):
        mode._settled(retried=False)
