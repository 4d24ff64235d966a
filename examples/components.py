"""A model of components, without a line of Pyro: infections counted in hospitals of different size and length of watch.

Every hospital has its own rate; counts are Poisson with the patient days as exposure. The truth is known.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

import bayesmeta as bm

MU, TAU = -2.0, 0.6


def log_rate(phi: Tensor, x: Tensor) -> Tensor:
    """The same log rate for all months of a hospital: `(T, 1, 1)` -> `(T, N)`."""
    return phi[..., 0].expand(x.shape[:2])


def hospitals(count: int, seed: int) -> tuple[bm.Tasks, np.ndarray]:
    """One to six months of counts a hospital with their exposure in 100 patient days, and the true log rates."""
    generator = np.random.default_rng(seed)
    phi = generator.normal(MU, TAU, count)
    exposure = [generator.uniform(2, 30, n) for n in generator.integers(1, 7, count)]
    y = [generator.poisson(np.exp(p) * e) for p, e in zip(phi, exposure, strict=True)]
    names = [f"hospital {seed}-{i}" for i in range(count)]
    return bm.Tasks.from_arrays(None, y, columns={"days": exposure}, names=names), phi


def main(*, count: int = 80, steps: int | None = None, progress: bool = True) -> dict[str, float]:
    """Fits, and returns how much closer to the truth new hospitals' rates are than their raw ones.

    Args:
        count: Hospitals to learn from.
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    model = bm.HierarchicalModel(bm.priors.Gaussian(1), log_rate, bm.likelihoods.Poisson(exposure="days"))
    print(model)
    known, _ = hospitals(count, seed=1)
    fit = bm.fit(model, known, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    print(fit)
    new, truth = hospitals(100, seed=2)
    post = fit.posterior(new)
    lower, middle, upper = post.quantile("phi", [0.05, 0.5, 0.95])[..., 0]
    inside = float(((truth > lower) & (truth < upper)).mean())
    edges = new.offsets.numpy()[:-1]
    raw = np.add.reduceat(new.y.numpy(), edges) / np.add.reduceat(new.columns["days"].numpy(), edges)
    errors = {
        name: float(np.abs(rate - np.exp(truth)).mean()) for name, rate in (("ours", np.exp(middle)), ("raw", raw))
    }
    print(f"true rates within their 90 % interval: {inside:.1%}")
    print(
        f"mean error of the rate, infections per 100 days: raw {errors['raw']:.4f}, posterior median "
        f"{errors['ours']:.4f}"
    )
    return {"inside": inside, **errors}


if __name__ == "__main__":
    main()
