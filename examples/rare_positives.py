"""Logistic tasks with rare positives: side effects in small trials, many of which saw none at all.

The raw rate of a trial without an event is 0, its own logistic regression does not exist; the learned prior gives every
trial a rate and an interval. The truth is known.
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist

import bayesmeta as bm

MU, TAU, EFFECT = -3.0, 0.8, 1.0


def side_effects(batch: bm.Batch) -> None:
    """Log odds of a side effect: a level for each trial, and one effect of the dose for all."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    effect = pyro.sample("effect", dist.Normal(0.0, 2.0))
    with batch.tasks():
        level = pyro.sample("level", dist.Normal(mu, tau))
        with batch.observations():
            logits = level + effect * batch.x[..., 0]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=batch.y.to(logits.dtype))


def trials(count: int, seed: int) -> tuple[bm.Tasks, np.ndarray]:
    """Trials of 10 to 40 patients at doses 0 or 1, and their true log odds at dose 0."""
    generator = np.random.default_rng(seed)
    level = generator.normal(MU, TAU, count)
    dose = [generator.integers(0, 2, (n, 1)).astype(float) for n in generator.integers(10, 41, count)]
    chance = [1 / (1 + np.exp(-v - EFFECT * d[:, 0])) for v, d in zip(level, dose, strict=True)]
    y = [(generator.random(len(p)) < p).astype(int) for p in chance]
    return bm.Tasks.from_arrays(dose, y, names=[f"trial {seed}-{i}" for i in range(count)]), level


def main(*, count: int = 100, steps: int | None = None, progress: bool = True) -> dict[str, float]:
    """Fits, and returns shares of true levels within their intervals, over all new trials and those without events.

    Args:
        count: Trials to learn from.
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    known, _ = trials(count, seed=1)
    fit = bm.fit(side_effects, known, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    print(fit)
    new, truth = trials(200, seed=2)
    post = fit.posterior(new)
    lower, upper = post.quantile("level", [0.05, 0.95])
    inside = (truth > lower) & (truth < upper)
    none = np.add.reduceat(new.y.numpy(), new.offsets.numpy()[:-1]) == 0
    rates = 100 / (1 + np.exp(-post.mean("level")[none]))
    print(
        f"{none.sum()} of {len(new)} new trials saw no event; their rates are estimated at {rates.min():.1f} to "
        f"{rates.max():.1f} %"
    )
    print(f"true levels within their 90 % interval: all {inside.mean():.1%}, without events {inside[none].mean():.1%}")
    effect = abs(float(fit.shared.mean("effect")) - EFFECT) / float(fit.shared.sd("effect"))
    return {
        "inside": float(inside.mean()),
        "inside, no event": float(inside[none].mean()),
        "effect error in sds": effect,
    }


if __name__ == "__main__":
    main()
