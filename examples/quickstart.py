"""Quickstart: an ordinary Pyro model of many small data sets, a new one with three rows, and how far to trust it.

Simulated shops sell at prices x; each has its own base demand and price effect, few observations, and the truth is
known. Prints what is learned for all of them, and for a shop never seen before.
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist

import bayesmeta as bm

MU, TAU, SIGMA = np.array([2.0, -1.0]), np.array([1.0, 0.5]), 0.5


def demand(batch: bm.Batch) -> None:
    """Base demand and price effect of every shop: phi ~ N(mu, tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(2.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, sigma), obs=batch.y)


def shops(count: int, seed: int) -> tuple[bm.Tasks, np.ndarray]:
    """Shops with 3 to 12 observations, and their true parameters `(shop, 2)`."""
    generator = np.random.default_rng(seed)
    phi = generator.normal(MU, TAU, (count, 2))
    x = [generator.uniform(-1, 1, (n, 1)) for n in generator.integers(3, 13, count)]
    y = [p[0] + p[1] * a[:, 0] + SIGMA * generator.standard_normal(len(a)) for p, a in zip(phi, x, strict=True)]
    return bm.Tasks.from_arrays(x, y, names=[f"shop {seed}-{i}" for i in range(count)]), phi


def main(*, count: int = 120, steps: int | None = None, progress: bool = True) -> dict[str, float]:
    """Fits, and returns the share of true values within 90 % intervals and the errors of the shared means in sds.

    Args:
        count: Shops to learn from.
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    known, _ = shops(count, seed=1)
    fit = bm.fit(demand, known, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    print(fit)
    new, truth = shops(100, seed=2)
    context, target = new.context_target(context=3, seed=0)
    post = fit.posterior(context)
    print(post.summary().head(4).to_string())
    print(f"flagged: {sum(flag != '' for flag in post.flag)} of {len(post.names)}")
    lower, upper = post.quantile("phi", [0.05, 0.95])
    inside = float(((truth > lower) & (truth < upper)).mean())
    occupied = np.asarray(target.sizes) > 0
    scores = post.predict(target).log_prob()[occupied]
    print(f"true values within their 90 % interval: {inside:.1%}; log score of an unseen row: {np.nanmean(scores):.3f}")
    error = np.abs(fit.shared.mean("mu") - MU) / fit.shared.sd("mu")
    return {"inside": inside, "error of mu in sds": float(error.max())}


if __name__ == "__main__":
    main()
