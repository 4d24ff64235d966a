"""Time of a training step, one thread: `python -m benchmarks.step_time [--draws 1] [--rounds 60]`.

256 tasks with 16 rows and 4 parameters, linear regression. The engine's step (recorded density, negative ELBO with the
sticking-the-landing gradient, fused Adam) against the same step written by hand in raw PyTorch and, for the DeepSet,
Pyro's stock SVI. Steps are timed in interleaved rounds; the figure is the 10th percentile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.networks import MLP
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.objectives import Guides, Step, elbo
from bayesmeta.inference.protocols import Context, TaskGuide
from bayesmeta.inference.shared import NormalShared
from benchmarks.raw_steps import RawDeepSet, RawNatural, raw_step

TASKS, ROWS, INPUTS = 256, 16, 4
LR = 1e-3
BARS = {
    ("DeepSet, engine", "DeepSet, by hand"): 1.15,
    ("DeepSet, engine", "DeepSet, stock SVI"): 0.75,
    ("default guide, engine", "default guide, by hand"): 1.25,
}


def regression(batch: bm.Batch) -> None:
    """Linear regression with 4 inputs and no intercept, coefficients normal around a common mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0).expand([INPUTS]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([INPUTS]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        beta = pyro.sample("beta", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal((batch.x * beta).sum(-1), sigma), obs=batch.y)


class DiagonalTasks:
    """Normal task posteriors with diagonal covariance that do not see θ: location and log sd `(T, d)`."""

    def __init__(self, loc: Tensor, log_sd: Tensor, draws: int) -> None:
        self.loc, self.log_sd, self._draws = loc, log_sd, draws

    def sample(self, *, heavy: bool = False) -> Tensor:
        noise = torch.randn(self._draws, *self.loc.shape, dtype=self.loc.dtype)
        return self.loc + self.log_sd.exp() * noise

    def log_prob(self, noise: Tensor, *, heavy: bool = False) -> Tensor:
        white = (noise - self.loc) * (-self.log_sd).exp()
        return -0.5 * white.square().sum(-1) - self.log_sd.sum(-1) - 0.5 * noise.shape[-1] * np.log(2 * np.pi)


class DeepSet(TaskGuide):
    """5-32-32, mean over the rows, 32-32-8."""

    def attach(self, density: TaskDensity, tasks: bm.Tasks) -> None:
        self.rows, self.head = MLP([INPUTS + 1, 32, 32]), MLP([32, 32, 2 * INPUTS])
        self.to(density.dtype)

    def prepare(self, batch: bm.Batch, data: dict[str, Tensor]) -> Context:
        pooled = self.rows(torch.cat([data["x"], data["y"].unsqueeze(-1)], -1)).mean(1)
        return Context(batch, data, {"pooled": self.head(pooled)})

    def condition(self, theta: Tensor, context: Context) -> DiagonalTasks:
        loc, log_sd = context.summary["pooled"].chunk(2, -1)
        return DiagonalTasks(loc, log_sd, len(theta))


def simulated() -> bm.Tasks:
    """Data from the model."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((TASKS, ROWS, INPUTS))
    beta = 0.5 + generator.standard_normal((TASKS, 1, INPUTS))
    y = (x * beta).sum(-1) + 0.5 * generator.standard_normal((TASKS, ROWS))
    return bm.Tasks.from_arrays(list(x), list(y))


def engine_step(tasks: bm.Tasks, guide: TaskGuide, draws: int, dtype: torch.dtype) -> Callable[[], None]:
    """A step of the package."""
    density = TaskDensity(regression, tasks, dtype=dtype)
    guide.attach(density, tasks)
    guides = Guides(NormalShared(*density.prior_scale()), guide)
    batch = tasks.batch(range(TASKS))
    data = density.tensors(batch)
    adam = torch.optim.Adam([*guides.shared.parameters(), *guide.parameters()], lr=LR, fused=True)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        guide.follow(*guides.shared.centre())
        loss, _ = elbo(density, guides, Step(guide.prepare(batch, data), TASKS, draws))
        loss.backward()
        adam.step()
        float(loss.detach())

    return step


def svi_step(tasks: bm.Tasks, draws: int, dtype: torch.dtype) -> Callable[[], None]:
    """A step of Pyro's SVI as its tutorials write it, with the same DeepSet."""
    batch = tasks.batch(range(TASKS))
    batch = batch.replace({k: t.to(dtype) if t.is_floating_point() else t for k, t in batch.tensors.items()})
    rows, head = MLP([INPUTS + 1, 32, 32]).to(dtype), MLP([32, 32, 2 * INPUTS]).to(dtype)
    inputs = torch.cat([batch.x, batch.y.unsqueeze(-1)], -1)

    def guide(batch: bm.Batch) -> None:
        pyro.module("rows", rows)
        pyro.module("head", head)
        for name, family in (("mu", dist.Normal), ("tau", dist.LogNormal)):
            loc = pyro.param(f"{name}_loc", torch.zeros(INPUTS, dtype=dtype))
            sd = pyro.param(f"{name}_sd", torch.full((INPUTS,), 0.1, dtype=dtype), dist.constraints.positive)
            pyro.sample(name, family(loc, sd).to_event(1))
        loc = pyro.param("sigma_loc", torch.tensor(0.0, dtype=dtype))
        sd = pyro.param("sigma_sd", torch.tensor(0.1, dtype=dtype), dist.constraints.positive)
        pyro.sample("sigma", dist.LogNormal(loc, sd))
        loc, log_sd = head(rows(inputs).mean(1)).chunk(2, -1)
        with batch.tasks():
            pyro.sample("beta", dist.Normal(loc.unsqueeze(1), log_sd.exp().unsqueeze(1)).to_event(1))

    pyro.clear_param_store()
    objective = Trace_ELBO(num_particles=draws, vectorize_particles=draws > 1, max_plate_nesting=2)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": LR}), objective)

    def step() -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        svi.step(batch)
        torch.set_default_dtype(before)

    return step


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """CPU milliseconds of each step: 10th percentile over rounds in which every step has its turn."""
    for step in steps.values():
        for _ in range(5):
            step()
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(5):
                start = time.process_time()
                step()
                spent[name].append(1e3 * (time.process_time() - start))
    return {name: float(np.percentile(values, 10)) for name, values in spent.items()}


def compare(draws: int, rounds: int, dtype: torch.dtype) -> None:
    """Prints times and ratios."""
    torch.manual_seed(0)
    tasks = simulated()
    batch = tasks.batch(range(TASKS))
    x, y = batch.x.to(dtype), batch.y.to(dtype)
    steps: dict[str, Callable[[], None]] = {
        "DeepSet, engine": engine_step(tasks, DeepSet(), draws, dtype),
        "DeepSet, by hand": raw_step(RawDeepSet(INPUTS, dtype), x, y, draws),
        "DeepSet, stock SVI": svi_step(tasks, draws, dtype),
        "default guide, engine": engine_step(tasks, NaturalGuide(), draws, dtype),
        "default guide, by hand": raw_step(RawNatural(INPUTS, dtype), x, y, draws),
    }
    took = timed(steps, rounds)
    print(f"{dtype}, {draws} draw(s) of θ a step")
    for name, value in took.items():
        print(f"  {name:26s} {value:7.3f} ms")
    for pair, bar in BARS.items():
        print(f"  {pair[0]} / {pair[1]}: {took[pair[0]] / took[pair[1]]:.2f} (bar {bar})")


def main() -> None:
    """Compares in float32 (the bars) and float64."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for draws in options.draws:
        for dtype in (torch.float32, torch.float64):
            compare(draws, options.rounds, dtype)


if __name__ == "__main__":
    main()
