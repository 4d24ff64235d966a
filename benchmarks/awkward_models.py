"""Models whose task posteriors are awkward, and their data: each an ordinary Pyro function, each with fixed seeds.

Tasks are simulated without Pyro. `awkward_densities.py` states the same models a second time, in NumPy, for
`references.py`. Most models have a known prior (no shared sites), so that the posterior of a task stands alone; where θ
is unknown it is integrated over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm

SIZES = (1, 1, 2, 2, 3, 5, 10, 30)
COUNT = 40
WIDE = 20
"""Parameters of the models with more parameters than rows."""
Random = np.random.Generator
Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A model and its tasks.

    Attributes:
        model: The Pyro function.
        task: Simulates one task of n rows: `{"y": (n,), "x": (n, dx), columns: (n,)}`.
        why: What is awkward.
        sizes: Numbers of rows that tasks have.
        easy: Whether it is one of the models that should never be flagged.
    """

    model: Callable[[bm.Batch], None]
    task: Callable[[Random, int], Rows]
    why: str
    sizes: tuple[int, ...] = SIZES
    easy: bool = False

    def tasks(self, *, count: int = COUNT, seed: int = 0) -> bm.Tasks:
        """The tasks of the collection; another seed gives new ones, with other names."""
        random = np.random.default_rng([seed, 7])
        rows = [self.task(random, self.sizes[i % len(self.sizes)]) for i in range(count)]
        extra = {k: [r[k] for r in rows] for k in rows[0] if k not in ("x", "y")}
        x = [r["x"] for r in rows] if "x" in rows[0] else None
        names = [f"{seed}.{i}" for i in range(count)]
        return bm.Tasks.from_arrays(x, [r["y"] for r in rows], columns=extra or None, names=names)


def _normal(loc: float, scale: float, size: int) -> dist.TorchDistribution:
    return dist.Normal(loc, scale).expand([size]).to_event(1)


def heavy_tails(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.StudentT(3.0, 0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.StudentT(3.0, phi, 1.0), obs=batch.y)


def _heavy_tails(random: Random, n: int) -> Rows:
    return {"y": 2.0 * random.standard_t(2) + random.standard_t(1.5, n)}


def funnel(batch: bm.Batch) -> None:
    with batch.tasks():
        v = pyro.sample("v", dist.Normal(0.0, 1.5))
        w = pyro.sample("w", dist.Normal(torch.zeros_like(v), v.exp()))
        with batch.observations():
            pyro.sample("y", dist.Normal(w, 0.5), obs=batch.y)


def _funnel(random: Random, n: int) -> Rows:
    return {"y": np.exp(random.normal(0, 1.5)) * random.normal() + 0.5 * random.normal(size=n)}


def rare_positives(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(-3.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Bernoulli(logits=phi.expand(batch.y.shape)), obs=batch.y)


def _rare_positives(random: Random, n: int) -> Rows:
    p = 1 / (1 + np.exp(3.0 - 1.5 * random.normal()))
    return {"y": (random.random(n) < p).astype(float)}


def zero_counts(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Poisson(batch["exposure"] * phi.exp()), obs=batch.y)


def _zero_counts(random: Random, n: int) -> Rows:
    exposure = random.uniform(0.2, 3.0, n)
    return {"y": random.poisson(exposure * np.exp(-1.5 + 1.8 * random.normal())), "exposure": exposure}


def edge_probability(batch: bm.Batch) -> None:
    with batch.tasks():
        p = pyro.sample("p", dist.Beta(0.5, 0.5))
        with batch.observations():
            pyro.sample("y", dist.Binomial(batch["trials"].expand(batch.y.shape), p), obs=batch.y)


def _edge_probability(random: Random, n: int) -> Rows:
    trials = random.integers(1, 60, n).astype(float)
    p = random.choice([0.0, 0.001, 0.02, 0.5, 0.98, 1.0])
    return {"y": random.binomial(trials.astype(int), p).astype(float), "trials": trials}


def small_noise(batch: bm.Batch) -> None:
    with batch.tasks():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(m, s), obs=batch.y)


def _small_noise(random: Random, n: int) -> Rows:
    return {"y": random.normal() + random.choice([0.003, 0.05, 1.0]) * random.normal(size=n)}


def phase(batch: bm.Batch) -> None:
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(0.0, 1.5))
        shift = pyro.sample("shift", dist.Uniform(-math.pi, math.pi))
        with batch.observations():
            pyro.sample("y", dist.Normal(a * (batch.x[..., 0] + shift).sin(), 0.3), obs=batch.y)


def _phase(random: Random, n: int) -> Rows:
    x = random.uniform(-3, 3, (n, 1))
    mean = random.normal(0, 1.5) * np.sin(x[:, 0] + random.uniform(-math.pi, math.pi))
    return {"x": x, "y": mean + 0.3 * random.normal(size=n)}


def square(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi.square(), 0.3), obs=batch.y)


def _square(random: Random, n: int) -> Rows:
    return {"y": random.normal() ** 2 + 0.3 * random.normal(size=n)}


def square_shared(batch: bm.Batch) -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi.square(), 0.5), obs=batch.y)


def _square_shared(random: Random, n: int) -> Rows:
    return {"y": random.normal(0, 1.5) ** 2 + 0.5 * random.normal(size=n)}


def product(batch: bm.Batch) -> None:
    with batch.tasks():
        ab = pyro.sample("ab", _normal(0.0, 1.0, 2))
        with batch.observations():
            pyro.sample("y", dist.Normal(ab[..., 0] * ab[..., 1], 0.2), obs=batch.y)


def _product(random: Random, n: int) -> Rows:
    return {"y": random.normal() * random.normal() + 0.2 * random.normal(size=n)}


def one_example(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 3.0))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.exp().expand(batch.y.shape)), obs=batch.y)


def _one_example(random: Random, n: int) -> Rows:
    return {"y": random.poisson(np.exp(np.full(n, random.normal(0, 3))))}


def twenty(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", _normal(0.0, 1.0, WIDE))
        with batch.observations():
            mean = (batch.x * phi).sum(-1)
            pyro.sample("y", dist.StudentT(2.0, mean, 0.1), obs=batch.y)


def _twenty(random: Random, n: int) -> Rows:
    x = random.normal(size=(n, WIDE)) / math.sqrt(WIDE)
    return {"x": x, "y": x @ random.normal(size=WIDE) + 0.1 * random.standard_t(2, n)}


def sparse(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Laplace(0.0, 1.0).expand([WIDE]).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal((batch.x * phi).sum(-1), 0.5), obs=batch.y)


def _sparse(random: Random, n: int) -> Rows:
    x = random.normal(size=(n, WIDE))
    return {"x": x, "y": x @ random.laplace(size=WIDE) + 0.5 * random.normal(size=n)}


def laplace_prior(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi[..., 0] + phi[..., 1] * batch.x[..., 0], 0.5), obs=batch.y)


def _laplace_prior(random: Random, n: int) -> Rows:
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


def _mixture_prior(random: Random, n: int) -> Rows:
    return {"y": random.choice([-4.0, 4.0]) + 0.5 * random.normal() + 6.0 * random.normal(size=n)}


def outliers(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 3.0))
        with batch.observations():
            loc = torch.stack(torch.broadcast_tensors(phi, torch.zeros_like(batch.y)), -1)
            noise = dist.Normal(loc, torch.tensor([0.3, 5.0]))
            share = dist.Categorical(torch.tensor([0.6, 0.4]).expand(loc.shape))
            pyro.sample("y", dist.MixtureSameFamily(share, noise), obs=batch.y)


def _outliers(random: Random, n: int) -> Rows:
    wild = random.random(n) < 0.4
    return {"y": np.where(wild, random.normal(0, 5, n), random.normal(0, 3) + 0.3 * random.normal(size=n))}


def rectified(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", _normal(0.0, 1.0, 2))
        with batch.observations():
            mean = 2.0 * phi[..., 0] * torch.relu(batch.x[..., 0] - phi[..., 1])
            pyro.sample("y", dist.Normal(mean, 0.3), obs=batch.y)


def _rectified(random: Random, n: int) -> Rows:
    x, phi = random.normal(size=(n, 1)), random.normal(size=2)
    return {"x": x, "y": 2 * phi[0] * np.maximum(x[:, 0] - phi[1], 0) + 0.3 * random.normal(size=n)}


def change_point(batch: bm.Batch) -> None:
    with batch.tasks():
        c = pyro.sample("c", dist.Uniform(0.0, 1.0))
        with batch.observations():
            mean = torch.where(batch.x[..., 0] > c, 1.0, -1.0)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=batch.y)


def _change_point(random: Random, n: int) -> Rows:
    x = random.random((n, 1))
    return {"x": x, "y": np.where(x[:, 0] > random.random(), 1.0, -1.0) + random.normal(size=n)}


def overdispersed(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(1.0, 1.5))
        r = pyro.sample("r", dist.LogNormal(0.0, 1.5))
        with batch.observations():
            logits = (phi - r.log()).expand(batch.y.shape)
            pyro.sample("y", dist.NegativeBinomial(r, logits=logits), obs=batch.y)


def _overdispersed(random: Random, n: int) -> Rows:
    r = np.exp(random.normal(0, 1.5))
    return {"y": random.poisson(random.gamma(r, np.exp(random.normal(1.0, 1.5)) / r, n))}


def censored(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.7))
        with batch.observations():
            z = (batch.y - phi) / s
            seen = -0.5 * z.square() - s.log() - 0.5 * math.log(2 * math.pi)
            beyond = torch.special.log_ndtr(-z)
            pyro.factor("y", torch.where(batch["censored"] > 0, beyond, seen))


def _censored(random: Random, n: int) -> Rows:
    y = random.normal(0, 2) + np.exp(random.normal(0, 0.7)) * random.normal(size=n)
    return {"y": np.minimum(y, 0.0), "censored": (y > 0).astype(float)}


def outlier_tasks(batch: bm.Batch) -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.7))
    with batch.tasks():
        phi = pyro.sample("phi", dist.StudentT(3.0, torch.zeros_like(tau), tau))
        with batch.observations():
            pyro.sample("y", dist.StudentT(2.0, phi, 0.5), obs=batch.y)


def _outlier_tasks(random: Random, n: int) -> Rows:
    return {"y": random.standard_t(2) + 0.5 * random.standard_t(1.5, n)}


def easy_normal(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi, 1.0), obs=batch.y)


def _easy_normal(random: Random, n: int) -> Rows:
    return {"y": 1.0 + 0.8 * random.normal() + random.normal(size=n)}


def easy_logistic(batch: bm.Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", _normal(0.0, 1.0, 2))
        with batch.observations():
            logits = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=batch.y)


def _easy_logistic(random: Random, n: int) -> Rows:
    x, phi = random.normal(size=(n, 1)), random.normal(size=2)
    return {"x": x, "y": (random.random(n) < 1 / (1 + np.exp(-phi[0] - phi[1] * x[:, 0]))).astype(float)}


def easy_poisson(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.5))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.exp().expand(batch.y.shape)), obs=batch.y)


def _easy_poisson(random: Random, n: int) -> Rows:
    return {"y": random.poisson(np.exp(1.5 + 0.5 * random.normal()), n)}


PLENTY = (20, 30, 40, 60)
CASES = {
    "heavy_tails": Case(heavy_tails, _heavy_tails, "Student-t prior and likelihood in conflict"),
    "funnel": Case(funnel, _funnel, "log sd and value of the same task"),
    "rare_positives": Case(rare_positives, _rare_positives, "logistic, all-zero tasks, θ unknown"),
    "zero_counts": Case(zero_counts, _zero_counts, "Poisson, all-zero tasks, θ unknown"),
    "edge_probability": Case(edge_probability, _edge_probability, "probabilities at 0 and 1"),
    "small_noise": Case(small_noise, _small_noise, "a noise sd near 0 for each task"),
    "phase": Case(phase, _phase, "sinusoid: (a, shift) and (-a, shift + π)"),
    "square": Case(square, _square, "φ and -φ"),
    "square_shared": Case(square_shared, _square_shared, "φ and -φ, θ unknown"),
    "product": Case(product, _product, "(a, b) and (-a, -b), hyperbolas"),
    "one_example": Case(one_example, _one_example, "one count, wide prior", sizes=(1,)),
    "twenty": Case(twenty, _twenty, "20 parameters, 2 heavy-tailed rows", sizes=(2,)),
    "sparse": Case(sparse, _sparse, "20 parameters with Laplace priors, 2 rows", sizes=(2,)),
    "laplace_prior": Case(laplace_prior, _laplace_prior, "kinks of the prior"),
    "mixture_prior": Case(mixture_prior, _mixture_prior, "two components, 16 sds apart"),
    "outliers": Case(outliers, _outliers, "a row is an outlier or not", sizes=(1, 2, 3, 3, 4, 5)),
    "rectified": Case(rectified, _rectified, "kinks of the likelihood"),
    "change_point": Case(change_point, _change_point, "jumps of the likelihood"),
    "overdispersed": Case(overdispersed, _overdispersed, "counts with a concentration for each task"),
    "censored": Case(censored, _censored, "tasks with nothing but censored rows"),
    "outlier_tasks": Case(outlier_tasks, _outlier_tasks, "heavy tails, θ unknown"),
    "easy_normal": Case(easy_normal, _easy_normal, "Gaussian, θ unknown", easy=True),
    "easy_logistic": Case(easy_logistic, _easy_logistic, "plenty of binary rows", sizes=PLENTY, easy=True),
    "easy_poisson": Case(easy_poisson, _easy_poisson, "plenty of counts, θ unknown", sizes=PLENTY, easy=True),
}
