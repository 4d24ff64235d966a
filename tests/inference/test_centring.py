"""Centred coordinates: the same density, chosen where rows say much about tasks, and chains that mix better there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import TAU, centre, drawn_rows, exact, make_tasks

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import nuts
from bayesmeta.inference.centring import Centred, informed
from bayesmeta.inference.joint import Joint
from bayesmeta.inference.sampling import Lengths, sample
from bayesmeta.inference.shear import Sheared

pytestmark = pytest.mark.usefixtures("uncompiled")

RNG = np.random.default_rng(0)
MANY = drawn_rows(20, seed=0, sizes=(40, 60))
FEW = drawn_rows(20, seed=0, sizes=(1, 2))


def lines(batch: bm.Batch) -> None:
    """Two sites a task, one of them a vector with correlated prior."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    rho = pyro.sample("rho", dist.Uniform(-1.0, 1.0))
    with batch.tasks():
        level = pyro.sample("level", dist.Normal(0.5, tau))
        covariance = torch.stack([torch.stack([torch.ones(()), rho]), torch.stack([rho, torch.ones(())])])
        slope = pyro.sample("slope", dist.MultivariateNormal(torch.ones(2), covariance_matrix=covariance))
        with batch.observations():
            mean = level + (slope * batch.x).sum(-1)
            pyro.sample("y", dist.Normal(mean, 0.3), obs=batch.y)


def positive(batch: bm.Batch) -> None:
    """Log-normal scales of tasks: no linear function of their noise."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch.tasks():
        scale = pyro.sample("scale", dist.LogNormal(mu, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(0.0, scale), obs=batch.y)


def halves(batch: bm.Batch) -> None:
    """A site whose prior is no normal."""
    rate = pyro.sample("rate", dist.HalfNormal(1.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Laplace(0.0, rate))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, 0.3), obs=batch.y)


def line_tasks() -> bm.Tasks:
    x = [RNG.normal(size=(n, 2)) for n in (9, 3, 9, 5)]
    return bm.Tasks.from_arrays(x, [a @ [1.0, -1.0] + RNG.normal(size=len(a)) for a in x])


def test_the_density_is_that_of_the_parameters() -> None:
    """log p(θ, φ) = log p(θ, z) − Σ log |dφ/dz|: tau for each level, the triangular factor for each slope."""
    tasks = line_tasks()
    density = TaskDensity(lines, tasks)
    joint = Joint(density, tasks)
    centred = Centred(density, tasks, joint)
    positions = 0.5 * RNG.normal(size=(3, joint.size))
    own = centred.inverse(positions)
    np.testing.assert_allclose(centred.view(own[None])[0], joint.view(positions[None])[0], rtol=1e-9, atol=1e-12)
    for position, at in zip(positions, own, strict=True):
        shared = density.shared_values(torch.as_tensor(joint.view(position[None, None])[0, 0, :2]))
        stretch = float(shared["tau"].log() + 0.5 * torch.log1p(-(shared["rho"] ** 2)))
        value, gradient = centred(at)
        assert value == pytest.approx(joint(position)[0] - len(tasks) * stretch, rel=1e-9)
        for k in (0, 1, 2, joint.size - 1):
            step = 1e-6 * np.eye(joint.size)[k]
            assert gradient[k] == pytest.approx(
                (centred(at + step)[0] - centred(at - step)[0]) / 2e-6, rel=1e-5, abs=1e-5
            )


def test_draws_are_mapped_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = line_tasks()
    density = TaskDensity(lines, tasks)
    joint = Joint(density, tasks)
    centred, positions = Centred(density, tasks, joint), RNG.normal(size=(2, 5, joint.size))
    whole = centred.inverse(positions)
    monkeypatch.setattr("bayesmeta.inference.centring.CHUNK_NUMBERS", 3 * len(tasks) * 9)
    np.testing.assert_allclose(centred.inverse(positions), whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "rows", "expected"),
    [(centre, MANY, True), (centre, FEW, False), (positive, MANY, False), (halves, MANY, False)],
)
def test_where_rows_say_much_about_tasks(
    model: Callable[[bm.Batch], None], rows: dict[str, list[float]], expected: bool
) -> None:
    tasks = make_tasks(rows)
    density = TaskDensity(model, tasks)
    joint = Joint(density, tasks)
    assert informed(density, tasks, joint, 0.3 * RNG.normal(size=(2, 10, joint.size))) is expected


def test_one_coordinate_that_rows_say_nothing_about_is_enough_to_stay_whitened() -> None:
    """Its scale would be sampled in a funnel: 25 % of the draws below the 1 % quantile."""

    def five(batch: bm.Batch) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(5)).to_event(1))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, tau).to_event(1))
            with batch.observations():
                pyro.sample("y", dist.Normal((phi * batch.x).sum(-1), 0.3), obs=batch.y)

    x = RNG.normal(size=(10, 40, 5)) * [1, 1, 1, 1, 0]
    y = (x * RNG.normal(size=(10, 1, 5))).sum(-1) + 0.3 * RNG.normal(size=(10, 40))
    for inputs, expected in ((x, False), (RNG.normal(size=x.shape), True)):
        tasks = bm.Tasks.from_arrays(list(inputs), list(y))
        density = TaskDensity(five, tasks)
        joint = Joint(density, tasks)
        assert informed(density, tasks, joint, 0.1 * RNG.normal(size=(2, 10, joint.size))) is expected


def test_a_task_without_a_mode_is_not_informed(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = make_tasks(MANY)
    density = TaskDensity(centre, tasks)
    joint = Joint(density, tasks)
    modes, factor = joint.conditional_modes(np.zeros(1))
    monkeypatch.setattr(
        joint, "conditional_modes", lambda theta: (np.where(np.arange(20)[:, None] == 3, np.nan, modes), factor)
    )
    assert not informed(density, tasks, joint, 0.3 * RNG.normal(size=(2, 10, joint.size)))


def test_chains_in_these_coordinates_have_the_exact_moments_and_mix_better() -> None:
    tasks = make_tasks(MANY)
    density = TaskDensity(centre, tasks)
    joint = Joint(density, tasks)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not mixed well"):
        plain = sample(lambda: joint, joint.start, Lengths(2, 300, 500), view=joint.view)
    centred = Centred(density, tasks, joint)
    start = centred.inverse(joint.start())
    found = sample(lambda: centred, lambda: start, Lengths(2, 300, 500), view=centred.view)
    mean, covariance = exact(MANY)
    mu, noise = found.draws[..., 0], found.draws[..., 1:]
    assert abs(mu.mean() - mean[-1]) < 4 * np.sqrt(covariance[-1, -1] / found.mixing.ess[0])
    assert found.mixing.ess[0] > 5 * plain.mixing.ess[0]
    effects = (mu[..., None] + TAU * noise).reshape(-1, len(MANY))
    sd = np.sqrt(covariance.diagonal()[:-1])
    assert (np.abs(effects.mean(0) - mean[:-1]) < 5 * sd / np.sqrt(found.mixing.ess[1:].min())).all()
    np.testing.assert_allclose(effects.std(0), sd, rtol=0.15)


def test_nuts_chooses_among_the_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, kind in ((MANY, Centred), (FEW, Sheared)):
        tasks = make_tasks(rows)
        density = TaskDensity(centre, tasks)
        joint = Joint(density, tasks)
        spread = 0.3 * RNG.normal(size=(2, 10, joint.size))
        assert isinstance(nuts._coordinates(density, tasks, joint, spread), kind)
    monkeypatch.setattr(Sheared, "fits", False)
    assert nuts._coordinates(density, tasks, joint, spread) is joint
