"""Awkward models with a known prior, so that the posterior of a task stands alone, and one simulated task of each.

Each is an ordinary Pyro function of a batch; `NAME_task` simulates n rows without Pyro.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm

WIDE = 20
"""Parameters of the models with more parameters than rows."""
FEW = 6
"""Parameters of `mirror`: too many for draws of the prior to find its second mode."""
Random = np.random.Generator
Rows = dict[str, np.ndarray]


def _normal(loc: float, scale: float, size: int) -> dist.TorchDistribution:
    return dist.Normal(loc, scale).expand([size]).to_event(1)


def heavy_tails(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.StudentT(3.0, 0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.StudentT(3.0, phi, 1.0), obs=batch.y)


def heavy_tails_task(random: Random, n: int) -> Rows:
    return {"y": 2.0 * random.standard_t(2) + random.standard_t(1.5, n)}


def funnel(batch: bm.Batch) -> None:
    with batch.tasks():
        v = pyro.sample("v", dist.Normal(0.0, 1.5))
        w = pyro.sample("w", dist.Normal(torch.zeros_like(v), v.exp()))
        with batch.observations():
            pyro.sample("y", dist.Normal(w, 0.5), obs=batch.y)


def funnel_task(random: Random, n: int) -> Rows:
    return {"y": np.exp(random.normal(0, 1.5)) * random.normal() + 0.5 * random.normal(size=n)}


def edge_probability(batch: bm.Batch) -> None:
    with batch.tasks():
        p = pyro.sample("p", dist.Beta(0.5, 0.5))
        with batch.observations():
            pyro.sample("y", dist.Binomial(batch["trials"].expand(batch.y.shape), p), obs=batch.y)


def edge_probability_task(random: Random, n: int) -> Rows:
    trials = random.integers(1, 60, n).astype(float)
    p = random.choice([0.0, 0.001, 0.02, 0.5, 0.98, 1.0])
    return {"y": random.binomial(trials.astype(int), p).astype(float), "trials": trials}


def small_noise(batch: bm.Batch) -> None:
    with batch.tasks():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(m, s), obs=batch.y)


def small_noise_task(random: Random, n: int) -> Rows:
    return {"y": random.normal() + random.choice([0.003, 0.05, 1.0]) * random.normal(size=n)}


def phase(batch: bm.Batch) -> None:
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(0.0, 1.5))
        shift = pyro.sample("shift", dist.Uniform(-math.pi, math.pi))
        with batch.observations():
            pyro.sample("y", dist.Normal(a * (batch.x[..., 0] + shift).sin(), 0.3), obs=batch.y)


def phase_task(random: Random, n: int) -> Rows:
    x = random.uniform(-3, 3, (n, 1))
    mean = random.normal(0, 1.5) * np.sin(x[:, 0] + random.uniform(-math.pi, math.pi))
    return {"x": x, "y": mean + 0.3 * random.normal(size=n)}


def square(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi.square(), 0.3), obs=batch.y)


def square_task(random: Random, n: int) -> Rows:
    return {"y": random.normal() ** 2 + 0.3 * random.normal(size=n)}


def product(batch: bm.Batch) -> None:
    with batch.tasks():
        ab = pyro.sample("ab", _normal(0.0, 1.0, 2))
        with batch.observations():
            pyro.sample("y", dist.Normal(ab[..., 0] * ab[..., 1], 0.2), obs=batch.y)


def product_task(random: Random, n: int) -> Rows:
    return {"y": random.normal() * random.normal() + 0.2 * random.normal(size=n)}


def one_example(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 3.0))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.exp().expand(batch.y.shape)), obs=batch.y)


def one_example_task(random: Random, n: int) -> Rows:
    return {"y": random.poisson(np.exp(np.full(n, random.normal(0, 3))))}


def twenty(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", _normal(0.0, 1.0, WIDE))
        with batch.observations():
            mean = (batch.x * phi).sum(-1)
            pyro.sample("y", dist.StudentT(2.0, mean, 0.1), obs=batch.y)


def twenty_task(random: Random, n: int) -> Rows:
    x = random.normal(size=(n, WIDE)) / math.sqrt(WIDE)
    return {"x": x, "y": x @ random.normal(size=WIDE) + 0.1 * random.standard_t(2, n)}


def sparse(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Laplace(0.0, 1.0).expand([WIDE]).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal((batch.x * phi).sum(-1), 0.5), obs=batch.y)


def sparse_task(random: Random, n: int) -> Rows:
    x = random.normal(size=(n, WIDE))
    return {"x": x, "y": x @ random.laplace(size=WIDE) + 0.5 * random.normal(size=n)}


def laplace_prior(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi[..., 0] + phi[..., 1] * batch.x[..., 0], 0.5), obs=batch.y)


def laplace_prior_task(random: Random, n: int) -> Rows:
    x, phi = random.normal(size=(n, 1)), random.laplace(size=2)
    return {"x": x, "y": phi[0] + phi[1] * x[:, 0] + 0.5 * random.normal(size=n)}


def mixture_prior(batch: bm.Batch) -> None:
    with batch.tasks():
        prior = dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([-4.0, 4.0]), torch.tensor([0.5, 0.5]))
        )
        phi = pyro.sample("phi", prior)
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, 6.0), obs=batch.y)


def mixture_prior_task(random: Random, n: int) -> Rows:
    return {"y": random.choice([-4.0, 4.0]) + 0.5 * random.normal() + 6.0 * random.normal(size=n)}


def outliers(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 3.0))
        with batch.observations():
            loc = torch.stack(torch.broadcast_tensors(phi, torch.zeros_like(batch.y)), -1)
            noise = dist.Normal(loc, torch.tensor([0.3, 5.0]))
            share = dist.Categorical(torch.tensor([0.6, 0.4]).expand(loc.shape))
            pyro.sample("y", dist.MixtureSameFamily(share, noise), obs=batch.y)


def outliers_task(random: Random, n: int) -> Rows:
    wild = random.random(n) < 0.4
    return {"y": np.where(wild, random.normal(0, 5, n), random.normal(0, 3) + 0.3 * random.normal(size=n))}


def rectified(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", _normal(0.0, 1.0, 2))
        with batch.observations():
            mean = 2.0 * phi[..., 0] * torch.relu(batch.x[..., 0] - phi[..., 1])
            pyro.sample("y", dist.Normal(mean, 0.3), obs=batch.y)


def rectified_task(random: Random, n: int) -> Rows:
    x, phi = random.normal(size=(n, 1)), random.normal(size=2)
    return {"x": x, "y": 2 * phi[0] * np.maximum(x[:, 0] - phi[1], 0) + 0.3 * random.normal(size=n)}


def change_point(batch: bm.Batch) -> None:
    with batch.tasks():
        c = pyro.sample("c", dist.Uniform(0.0, 1.0))
        with batch.observations():
            mean = torch.where(batch.x[..., 0] > c, 1.0, -1.0)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=batch.y)


def change_point_task(random: Random, n: int) -> Rows:
    x = random.random((n, 1))
    return {"x": x, "y": np.where(x[:, 0] > random.random(), 1.0, -1.0) + random.normal(size=n)}


def overdispersed(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(1.0, 1.5))
        log_r = pyro.sample("log_r", dist.Normal(0.0, 1.5))
        with batch.observations():
            logits = (phi - log_r).expand(batch.y.shape)
            pyro.sample("y", dist.NegativeBinomial(log_r.exp(), logits=logits), obs=batch.y)


def overdispersed_task(random: Random, n: int) -> Rows:
    r = np.exp(random.normal(0, 1.5))
    return {"y": random.poisson(random.gamma(r, np.exp(random.normal(1.0, 1.5)) / r, n))}


def censored(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.7))
        with batch.observations():
            z = (batch.y - phi) / s
            seen = -0.5 * z.square() - s.log() - 0.5 * math.log(2 * math.pi)
            high = z.clamp(min=0.0)  # log_ndtr has no batching rule for vmap
            tail = torch.log(0.5 * torch.special.erfcx(high / math.sqrt(2))) - 0.5 * high.square()
            beyond = torch.where(z > 0, tail, torch.log(0.5 * torch.erfc(z.clamp(max=0.0) / math.sqrt(2))))
            pyro.factor("y", torch.where(batch["censored"] > 0, beyond, seen))


def censored_task(random: Random, n: int) -> Rows:
    y = random.normal(0, 2) + np.exp(random.normal(0, 0.7)) * random.normal(size=n)
    return {"y": np.minimum(y, 0.0), "censored": (y > 0).astype(float)}


def labels(batch: bm.Batch) -> None:
    with batch.tasks():
        m = pyro.sample("m", _normal(0.0, 2.0, 2))
        with batch.observations():
            loc = torch.stack(torch.broadcast_tensors(m[..., 0], m[..., 1], torch.zeros_like(batch.y))[:2], -1)
            share = dist.Categorical(torch.full(loc.shape, 0.5))
            pyro.sample("y", dist.MixtureSameFamily(share, dist.Normal(loc, 0.5)), obs=batch.y)


def labels_task(random: Random, n: int) -> Rows:
    m = random.normal(0, 2, 2)
    return {"y": m[random.integers(0, 2, n)] + 0.5 * random.normal(size=n)}


def mirror(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", _normal(0.0, 1.0, FEW))
        with batch.observations():
            seen = torch.cat([phi[..., :1].square(), phi[..., 1:]], -1)
            pyro.sample("y", dist.Normal((batch.x * seen).sum(-1), 0.1), obs=batch.y)


def mirror_task(random: Random, n: int) -> Rows:
    """Each row measures one parameter, in turn."""
    x, phi = np.eye(FEW)[np.arange(n) % FEW], random.normal(size=FEW)
    return {"x": x, "y": x @ np.append(phi[0] ** 2, phi[1:]) + 0.1 * random.normal(size=n)}
