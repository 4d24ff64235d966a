"""The flow guide: normalised, invertible, exact without rows, closer than a Gaussian where the posterior is bent."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import frozen
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.flows import FlowGuide
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.objectives import Guides, Step, elbo
from bayesmeta.inference.pooled import PooledGuide
from bayesmeta.inference.protocols import TaskGuide
from bayesmeta.inference.shared import NormalShared

pytest.importorskip("zuko")
SIGMA = 0.7


def banana(batch: Any) -> None:
    """One observation constrains φ₁ + φ₀²: the posterior is a banana."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with batch.observations():
            mean = phi[..., 1] + phi[..., 0] ** 2 + 0.0 * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, SIGMA), obs=batch.y)


def with_shared(batch: Any) -> None:
    """A shared mean and three task parameters."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, torch.ones(3)).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal((phi**2).sum(-1) * batch.x[..., 0], 1.0), obs=batch.y)


def one_parameter(batch: Any) -> None:
    """One task parameter."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi**2 * batch.x[..., 0], 1.0), obs=batch.y)


def make_tasks(sizes: list[int]) -> Tasks:
    rng = np.random.default_rng(0)
    y = []
    for n in sizes:
        phi = rng.normal(size=2)
        y.append(phi[1] + phi[0] ** 2 + SIGMA * rng.normal(size=n))
    return Tasks.from_arrays([rng.normal(size=(n, 1)) for n in sizes], y)


def bent(model: Any, tasks: Tasks, *, base: Any = None, amount: float = 0.2) -> tuple[FlowGuide, TaskDensity]:
    """A guide whose splines and Gaussian have left their start by random weights."""
    density = TaskDensity(model, tasks)
    guide = FlowGuide(base)
    guide.attach(density, tasks)
    with torch.no_grad():
        for parameter in guide.bend.parameters():
            parameter += amount * torch.randn_like(parameter)
    return guide, density


def condition(guide: TaskGuide, density: TaskDensity, tasks: Tasks, draws: int = 1) -> Any:
    batch = tasks.batch(range(len(tasks)))
    theta = torch.randn(draws, density.structure.shared_size, dtype=torch.float64)
    return guide(theta, guide.prepare(batch, density.tensors(batch)))


def test_starts_as_the_gaussian() -> None:
    tasks = make_tasks([1, 3, 0])
    guide, density = bent(banana, tasks, amount=0.0)
    with torch.no_grad():
        posterior = condition(guide, density, tasks, draws=4)
        noise = posterior.sample()
        assert (noise - posterior.base.loc).abs().max() > 0.1
        torch.testing.assert_close(posterior.log_prob(noise), posterior.base.log_prob(noise))
        heavy = posterior.sample(heavy=True)
        torch.testing.assert_close(posterior.log_prob(heavy, heavy=True), posterior.base.log_prob(heavy, heavy=True))


@pytest.mark.parametrize("base", ["natural", "deepset", "attention"])
def test_no_rows_is_exactly_the_prior(base: str) -> None:
    tasks = make_tasks([3, 0])
    guide, density = bent(banana, tasks, base=None if base == "natural" else PooledGuide(encoder=base))
    with torch.no_grad():
        posterior = condition(guide, density, tasks, draws=50)
        noise = 2 * torch.randn(50, 2, 2, dtype=torch.float64)
        prior = -0.5 * noise.square().sum(-1) - math.log(2 * math.pi)
        away = (posterior.log_prob(noise) - prior).abs().amax(0)
    assert away[1] < 1e-10
    assert away[0] > 0.1


@pytest.mark.parametrize("heavy", [False, True])
def test_density_of_one_parameter_integrates_to_one(heavy: bool) -> None:
    tasks = make_tasks([2])
    guide, density = bent(one_parameter, tasks)
    half, points = (100.0, 100001) if heavy else (12.0, 12001)
    grid = torch.linspace(-half, half, points, dtype=torch.float64)
    with torch.no_grad():
        posterior = condition(guide, density, tasks)
        log_prob = posterior.log_prob(grid[:, None, None], heavy=heavy)[:, 0]
        wide = posterior.base.log_prob(grid[:, None, None], heavy=heavy)[:, 0]
    assert abs(float(torch.trapezoid(log_prob.exp(), grid)) - 1) < 1e-5
    assert (log_prob - wide).abs().max() > 0.1, "the splines must bend, or the test shows nothing"


def test_density_of_two_parameters_integrates_to_one() -> None:
    tasks = make_tasks([2])
    guide, density = bent(banana, tasks)
    line = torch.linspace(-9, 9, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).unsqueeze(1)
    with torch.no_grad():
        posterior = condition(guide, density, tasks)
        grid = grid + posterior.base.loc
        total = posterior.log_prob(grid).exp().sum() * float(line[1] - line[0]) ** 2
    assert abs(float(total) - 1) < 1e-3


def test_heavy_draws_have_the_heavy_density() -> None:
    """E[q / q_heavy] under q_heavy is one, and E[g q_heavy / q] under q is E[g] under q_heavy."""
    tasks = make_tasks([2])
    guide, density = bent(with_shared, tasks)
    with torch.no_grad():
        torch.manual_seed(1)
        theta = torch.zeros(20000, 1, dtype=torch.float64)
        batch = tasks.batch([0])
        posterior = guide(theta, guide.prepare(batch, density.tensors(batch)))
        noise = posterior.sample(heavy=True)
        ratio = (posterior.log_prob(noise) - posterior.log_prob(noise, heavy=True)).exp().squeeze(1)
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.02
    assert abs(ratio.mean() - 1) < 4 * error


def test_draws_come_back_as_their_noise() -> None:
    tasks = make_tasks([2, 5, 1])
    guide, density = bent(with_shared, tasks)
    with torch.no_grad():
        posterior = condition(guide, density, tasks, draws=20)
        white = 2 * torch.randn(20, 3, 3, dtype=torch.float64)
        there, log_det = posterior._bend(white, inverse=False)
        back, log_det_back = posterior._bend(there, inverse=True)
    assert (there - white).abs().max() > 0.1
    torch.testing.assert_close(back, white, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_det_back, log_det, rtol=1e-7, atol=1e-7)


def test_frozen_density_has_no_gradient_but_that_of_noise_and_theta() -> None:
    tasks = make_tasks([2, 3])
    guide, density = bent(with_shared, tasks)
    batch = tasks.batch([0, 1])
    context = guide.prepare(batch, density.tensors(batch))
    theta = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    noise = guide.condition(theta, context).sample().detach().requires_grad_()
    log_prob = frozen(guide, theta, context).log_prob(noise)
    torch.testing.assert_close(log_prob, guide.condition(theta, context).log_prob(noise))
    log_prob.sum().backward()
    assert all(p.grad is None for p in guide.parameters())
    for given in (theta, noise):
        assert given.grad is not None and given.grad.abs().max() > 0
    plain = noise.detach()
    step = 1e-6 * torch.eye(3, dtype=torch.float64)[0]
    with torch.no_grad():
        q = guide.condition(theta, context)
        slope = (q.log_prob(plain + step) - q.log_prob(plain - step)) / 2e-6
    torch.testing.assert_close(noise.grad[..., 0], slope, rtol=1e-4, atol=1e-5)


def log_evidence(tasks: Tasks) -> Tensor:
    """By quadrature on a grid, `(T,)`."""
    line = torch.linspace(-6, 6, 301, dtype=torch.float64)
    first, second = torch.meshgrid(line, line, indexing="ij")
    out = []
    for y in tasks.y.split(tasks.sizes.tolist()):
        log_p = dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(0.0, 1.0).log_prob(second)
        for value in y:
            log_p = log_p + dist.Normal(second + first**2, SIGMA).log_prob(value)
        out.append(log_p.flatten().logsumexp(0) + 2 * math.log(float(line[1] - line[0])))
    return torch.stack(out)


def trained_kl(guide: TaskGuide, density: TaskDensity, tasks: Tasks, *, steps: int) -> float:
    """Mean KL(q || p) over tasks after training with the ELBO."""
    guide.attach(density, tasks)
    guides = Guides(NormalShared(*density.prior_scale()), guide)
    batch = tasks.batch(range(len(tasks)))
    data = density.tensors(batch)
    adam = torch.optim.Adam(guide.parameters(), betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-2 * min(1.0, 20 * (step + 1) / steps) * (1 - step / steps)
        adam.zero_grad()
        elbo(density, guides, Step(guide.prepare(batch, data), len(tasks)))[0].backward()
        adam.step()
    with torch.no_grad():
        loss, _ = elbo(density, guides, Step(guide.prepare(batch, data), len(tasks), draws=1000))
    return float(log_evidence(tasks).mean() + loss)


@pytest.mark.parametrize(("pooled", "steps"), [(False, 100), (True, 120)])
def test_bends_to_a_banana(pooled: bool, steps: int) -> None:
    tasks = make_tasks([1 + i % 2 for i in range(12)])
    density = TaskDensity(banana, tasks)
    plain, base = (PooledGuide(), PooledGuide()) if pooled else (NaturalGuide(), NaturalGuide())
    gaussian = trained_kl(plain, density, tasks, steps=steps)
    flow = trained_kl(FlowGuide(base), density, tasks, steps=steps)
    assert gaussian > 0.3
    assert -0.02 < flow < 0.6 * gaussian


ISOLATED = """
import torch, pyro
from torch.distributions import Distribution, Transform, transforms

def below(cls):
    return [cls] + [c for sub in cls.__subclasses__() for c in below(sub)]

def state():
    classes = {c for c in below(Distribution) + below(Transform) if not c.__module__.startswith("zuko")}
    held = {(c, k): id(v) for c in classes for k, v in vars(c).items() if k != "call_and_ladj"}
    return held, {c: c.__name__ for c in classes}, torch.get_default_dtype(), torch.get_rng_state().tolist()

from bayesmeta.inference.flows import FlowGuide
import sys
before = state()
assert "zuko" not in sys.modules, "imported before it is needed"
FlowGuide()
assert "zuko" in sys.modules
assert state()[0].keys() == before[0].keys()
changed = [(c.__name__, k) for c, k in before[0] if state()[0][c, k] != before[0][c, k]]
assert not changed, changed
assert state()[1:3] == before[1:3]
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    pass
else:
    raise SystemExit("torch no longer validates")
import zuko
flow = zuko.flows.NSF(2, 1)(torch.zeros(1))
assert flow.log_prob(flow.sample()).isfinite()
"""


def test_importing_zuko_leaves_torch_as_it_was() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", ISOLATED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_zuko_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ValueError, match=r'family="flow" needs the package zuko.*pip install bayesmeta\[flows\]'):
        FlowGuide()


def test_other_bases_are_refused() -> None:
    with pytest.raises(ValueError, match="bends a NaturalGuide or a PooledGuide, got FlowGuide"):
        FlowGuide(FlowGuide())  # type: ignore[arg-type]
