"""Models with unknown shared parameters, and three easy ones; `NAME_task` simulates a task of n rows without Pyro."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm
from benchmarks.awkward_known import Random, Rows


def rare_positives(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(-3.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Bernoulli(logits=phi.expand(batch.y.shape)), obs=batch.y)


def rare_positives_task(random: Random, n: int) -> Rows:
    p = 1 / (1 + np.exp(3.0 - 1.5 * random.normal()))
    return {"y": (random.random(n) < p).astype(float)}


def zero_counts(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Poisson(batch["exposure"] * phi.exp()), obs=batch.y)


def zero_counts_task(random: Random, n: int) -> Rows:
    exposure = random.uniform(0.2, 3.0, n)
    return {"y": random.poisson(exposure * np.exp(-1.5 + 1.8 * random.normal())), "exposure": exposure}


def square_shared(batch: bm.Batch) -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi.square(), 0.5), obs=batch.y)


def square_shared_task(random: Random, n: int) -> Rows:
    return {"y": random.normal(0, 1.5) ** 2 + 0.5 * random.normal(size=n)}


def outlier_tasks(batch: bm.Batch) -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.7))
    with batch.tasks():
        phi = pyro.sample("phi", dist.StudentT(3.0, torch.zeros_like(tau), tau))
        with batch.observations():
            pyro.sample("y", dist.StudentT(2.0, phi, 0.5), obs=batch.y)


def outlier_tasks_task(random: Random, n: int) -> Rows:
    return {"y": random.standard_t(2) + 0.5 * random.standard_t(1.5, n)}


def easy_normal(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)


def easy_normal_task(random: Random, n: int) -> Rows:
    return {"y": 1.0 + 0.8 * random.normal() + random.normal(size=n)}


def easy_logistic(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with batch.observations():
            logits = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=batch.y)


def easy_logistic_task(random: Random, n: int) -> Rows:
    x, phi = random.normal(size=(n, 1)), random.normal(size=2)
    return {"x": x, "y": (random.random(n) < 1 / (1 + np.exp(-phi[0] - phi[1] * x[:, 0]))).astype(float)}


def easy_poisson(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.exp().expand(batch.y.shape)), obs=batch.y)


def easy_poisson_task(random: Random, n: int) -> Rows:
    return {"y": random.poisson(np.exp(1.5 + 0.5 * random.normal()), n)}
