"""Models and ragged tasks that tests share: twenty ways to write a hierarchical model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks

SIZES = (3, 1, 0, 4)


@dataclass(frozen=True)
class Scenario:
    """`reference` is the same model as plain Pyro would run it in float64 (by default `model` itself)."""

    name: str
    model: Callable[[Batch], Any]
    tasks: Tasks
    reference: Callable[[Batch], Any]


def make_tasks(kind: str = "real", sizes: tuple[int, ...] = SIZES, *, weighted: bool = False) -> Tasks:
    """Ragged tasks with two inputs, columns "se", "trials", "group" (0 … 2), "other" (0 … 4), task column "uranium"."""
    draw = torch.Generator().manual_seed(7)
    rows = [torch.rand(n, 2, generator=draw, dtype=torch.float64) * 2 - 1 for n in sizes]
    labels = [_labels(kind, n, draw) for n in sizes]
    columns = {
        "se": [0.5 + torch.rand(n, generator=draw, dtype=torch.float64) for n in sizes],
        "trials": [torch.randint(5, 9, (n,), generator=draw) for n in sizes],
        "group": [torch.arange(n) % 3 for n in sizes],
        "other": [torch.randint(0, 5, (n,), generator=draw) for n in sizes],
    }
    weights = {"weight": [0.5 + torch.rand(n, generator=draw, dtype=torch.float64) for n in sizes]} if weighted else {}
    extra = {"task_weight": torch.linspace(0.5, 2.0, len(sizes), dtype=torch.float64)} if weighted else {}
    return Tasks.from_arrays(
        rows,
        labels,
        columns=columns,
        task_columns={"uranium": torch.linspace(-1.0, 1.5, len(sizes), dtype=torch.float64)},
        missing="mask" if kind in ("missing", "outputs") else "error",
        **weights,
        **extra,
    )


def _labels(kind: str, n: int, draw: torch.Generator) -> Tensor:
    if kind == "count":
        return torch.randint(0, 5, (n,), generator=draw)
    width = (n, 2) if kind == "outputs" else (n,)
    y = torch.randn(width, generator=draw, dtype=torch.float64)
    if kind == "mixed":
        y = torch.where(torch.arange(n) % 3 == 0, -y.abs(), y.abs())
    if kind == "missing" and n > 2:
        y[1] = math.nan
    if kind == "outputs" and n > 2:
        y[0, 0] = y[2, 1] = math.nan
    return y


def line(phi: Tensor, batch: Batch) -> Tensor:
    """Intercept and slope `(T, 1, 2)` to means `(T, N)`."""
    return phi[..., 0] + phi[..., 1] * batch.x[..., 0]


def radon(batch: Batch) -> None:
    """The example of the README: partially pooled lines."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(line(phi, batch), sigma), obs=batch.y)


def supports(batch: Batch) -> None:
    """Shared and task sites on every kind of support."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
    mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    chol = pyro.sample("chol", dist.LKJCholesky(2, 1.5))
    bound = pyro.sample("bound", dist.Uniform(-1.0, 2.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    with batch.tasks():
        weights = pyro.sample("weights", dist.Dirichlet(1.0 + 3.0 * mix))
        scale = pyro.sample("scale", dist.LogNormal(bound, 0.5))
        size = pyro.sample("size", dist.Gamma(1.0 + rate, 2.0))
        corr = pyro.sample("corr", dist.LKJCholesky(3, 1.0 + share.expand(1, 1)))
        cut = pyro.sample("cut", dist.Uniform(bound, bound + 1.0))
        phi = pyro.sample("phi", dist.MultivariateNormal(torch.zeros(2), scale_tril=chol))
        with batch.observations():
            mean = line(phi, batch) + cut + corr[..., 2, 0] + weights[..., 1] * size
            pyro.sample("y", dist.StudentT(4.0, mean, scale), obs=batch.y)


def events(batch: Batch) -> None:
    """Matrices as values, and a user's plate over a shared site."""
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    with pyro.plate("inputs", 2):
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with batch.tasks():
        weights = pyro.sample("weights", dist.Normal(centre, spread.unsqueeze(-1)).to_event(2))
        with batch.observations():
            hidden = torch.tanh(batch.x.unsqueeze(-2) @ weights).squeeze(-2)
            pyro.sample("y", dist.Normal(hidden.sum(-1), 0.7), obs=batch.y)


def factors(batch: Batch) -> None:
    """`pyro.factor` for the shared sites, for a task and for a row; an observed shared site."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    pyro.factor("penalty", -0.3 * tau.square())
    pyro.sample("published", dist.Normal(tau, 0.4), obs=torch.tensor(0.8))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau))
        pyro.factor("shape", -phi.pow(4))
        with batch.observations():
            pyro.factor("rows", -torch.cosh(batch.y - phi).log())


def outputs(batch: Batch) -> None:
    """Two outputs with missing labels."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau).expand([2]).to_event(1))
        with batch.observations():
            for k in range(2):
                y, ok = batch.output(k)
                with poutine.mask(mask=ok):
                    pyro.sample(f"y{k}", dist.Normal(phi[..., k], 1.0 + k), obs=y)


def vector(batch: Batch) -> None:
    """No plate over rows: one event covers them, masked by hand."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau).expand([2]).to_event(1))
        rows = dist.Normal(line(phi, batch), 0.5).mask(batch.mask).log_prob(batch.y).sum(-1, keepdim=True)
        pyro.factor("y", rows)


def missing(batch: Batch) -> None:
    """A likelihood with a bounded support and missing labels."""
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Laplace(centre, 0.5))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, batch["se"]), obs=batch.y)


def network(net: nn.Module) -> Callable[[Batch], None]:
    """A net whose last layer is the task's parameters."""

    def model(batch: Batch) -> None:
        registered = pyro.module("net", net)
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, tau).expand([3]).to_event(1))
            with batch.observations():
                pyro.sample("y", dist.Normal((registered(batch.x) * phi).sum(-1), noise), obs=batch.y)

    return model


def non_centred(batch: Batch) -> None:
    """Standardised task sites, deterministic values, one of them a row's."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    pyro.deterministic("ratio", mu / tau)
    with batch.tasks():
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        phi = pyro.deterministic("phi", mu + tau * raw)
        with batch.observations():
            mean = pyro.deterministic("mean", phi + batch.x[..., 0])
            pyro.sample("y", dist.Normal(mean, 0.6), obs=batch.y)


def flat(batch: Batch) -> None:
    """Improper priors of shared sites."""
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    tau = pyro.sample("tau", dist.ImproperUniform(constraints.positive, (), (2,)))
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(line(phi, batch) + batch.x @ beta, 0.6), obs=batch.y)


def known_prior(batch: Batch) -> None:
    """No shared site at all."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(line(phi, batch), 0.6), obs=batch.y)


def groups_inside(batch: Batch) -> None:
    """Observations index into the task's parameter vector."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau).expand([3]).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi.squeeze(-2).gather(-1, batch["group"]), 1.0), obs=batch.y)


def second_grouping(batch: Batch) -> None:
    """A shared vector that rows of all tasks index."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    other = pyro.sample("other", dist.Normal(0.0, tau[0]).expand([5]).to_event(1))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau[1]))
        with batch.observations():
            logits = phi + other[batch["other"]]
            pyro.sample("y", dist.Binomial(batch["trials"], logits=logits), obs=batch.y)


def process(batch: Batch) -> None:
    """A Gaussian process couples the rows of a task."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.3))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        gap = (batch.x.unsqueeze(-2) - batch.x.unsqueeze(-3)).square().sum(-1) / length.square()
        cov = torch.exp(-0.5 * gap) + 0.3 * torch.eye(gap.shape[-1])
        mean = phi.unsqueeze(-1).expand(*phi.shape, gap.shape[-1])
        pyro.sample("y", dist.MultivariateNormal(mean, cov.unsqueeze(1)), obs=batch.y.unsqueeze(-2))


def scaled(batch: Batch) -> None:
    """Scales and masks on task sites."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        with poutine.scale(scale=0.5):
            phi = pyro.sample("phi", dist.Normal(0.3, tau))
        with poutine.scale(scale=1.0 + batch["uranium"].square()):
            psi = pyro.sample("psi", dist.Gamma(2.0, tau))
        with poutine.mask(mask=batch["uranium"] > 0):
            chi = pyro.sample("chi", dist.Exponential(tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi + chi, psi), obs=batch.y)


def funnel(batch: Batch) -> None:
    """A prior that depends on another task site and on a task column."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with batch.tasks():
        width = pyro.sample("width", dist.Normal(slope * batch["uranium"], 0.7))
        phi = pyro.sample("phi", dist.Normal(0.0, torch.exp(width)))
        tail = pyro.sample("tail", dist.StudentT(3.0, phi, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi + tail, 1.0), obs=batch.y)


def mixtures(batch: Batch) -> None:
    """Mixture priors: of a shared vector, of a real and of a positive task site."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    part = dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)
    centre = pyro.sample(
        "centre", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), part).expand([2]).to_event(1)
    )
    with batch.tasks():
        sides = dist.Normal(torch.stack([-centre[0], centre[1].exp()]), torch.tensor([0.4, 0.8]))
        phi = pyro.sample("phi", dist.MixtureSameFamily(dist.Categorical(weights), sides))
        scales = dist.LogNormal(torch.tensor([-1.0, 1.0]), 0.3)
        sigma = pyro.sample("sigma", dist.MixtureSameFamily(dist.Categorical(weights), scales))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, sigma), obs=batch.y)


def outliers(batch: Batch) -> None:
    """A location, its rows narrow around it or wide around zero."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 3.0))
        with batch.observations():
            loc = torch.stack(torch.broadcast_tensors(phi, torch.zeros_like(batch.y)), -1)
            share = dist.Categorical(torch.tensor([0.6, 0.4]).expand(loc.shape))
            pyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(loc, torch.tensor([0.3, 5.0]))), obs=batch.y)


def nested_support(batch: Batch) -> None:
    """Supports that depend on other sites."""
    high = pyro.sample("high", dist.HalfNormal(2.0))
    low = pyro.sample("low", dist.Uniform(0.0, high))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Uniform(low, high))
        psi = pyro.sample("psi", dist.Uniform(-phi, phi))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi + psi, 1.0), obs=batch.y)


def mixed_rows(batch: Batch) -> None:
    """Rows of two kinds, each with its own likelihood: masked labels lie outside the other support."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau))
        with batch.observations():
            with batch.rows_where("group", 0):
                pyro.sample("normal", dist.Normal(phi, 1.0), obs=batch.y)
            with poutine.mask(mask=batch["group"] > 0):
                pyro.sample("gamma", dist.LogNormal(phi, 1.0), obs=batch.y.abs())


def make_net() -> nn.Sequential:
    """A small float32 net, as users have them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(2, 4, dtype=torch.float32), nn.Tanh(), nn.Linear(4, 3, bias=False, dtype=torch.float32)
        )


def scenarios() -> list[Scenario]:
    """Every model with tasks that fit it."""
    real, weighted = make_tasks(), make_tasks(weighted=True)
    plain = {
        **dict.fromkeys((radon, supports, events, factors, vector, non_centred, flat, known_prior), real),
        **dict.fromkeys((groups_inside, scaled, funnel, mixtures, nested_support), real),
        outputs: make_tasks("outputs"),
        missing: make_tasks("missing"),
        second_grouping: make_tasks("count"),
        process: make_tasks(sizes=(4, 4, 4)),
        mixed_rows: make_tasks("mixed"),
    }
    found = [Scenario(model.__name__, model, tasks, model) for model, tasks in plain.items()]
    net = make_net()
    found.append(Scenario("network", network(net), real, network(copy.deepcopy(net).double())))
    found.append(Scenario("weighted", radon, weighted, radon))
    return found
