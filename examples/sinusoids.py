"""Few-shot sinusoids: a neural network learns features that all tasks share, and φ is the last layer of each task.

y = a sin(x + b) with its own amplitude and phase in every task. The network `x -> features` is registered with
`pyro.module` and learned with the prior; a new task then needs five points to be predicted everywhere. The guide gets a
network of its own to read x with (`embed`). How many posteriors are flagged is printed: their predictions may be good
all the same, but their intervals are not vouched for.
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import bayesmeta as bm

FEATURES, NOISE = 2, 0.3


def network() -> nn.Sequential:
    """The features of x."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, FEATURES))


class Sinusoids:
    """The model; it holds the network it registers."""

    def __init__(self) -> None:
        self.net = network()

    def __call__(self, batch: bm.Batch) -> None:
        """Φ ~ N(0, I) weighs the features; the network's scale is learned."""
        net = pyro.module("net", self.net)
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
            with batch.observations():
                pyro.sample("y", dist.Normal((net(batch.x) * phi).sum(-1), sigma), obs=batch.y)


def waves(count: int, points: int, seed: int) -> bm.Tasks:
    """Tasks with amplitudes 0.1 to 5, phases 0 to π, x from −5 to 5."""
    generator = np.random.default_rng(seed)
    amplitude, phase = generator.uniform(0.1, 5, count), generator.uniform(0, np.pi, count)
    x = generator.uniform(-5, 5, (count, points, 1))
    y = amplitude[:, None] * np.sin(x[..., 0] + phase[:, None]) + NOISE * generator.standard_normal((count, points))
    return bm.Tasks.from_arrays(list(x), list(y), names=[f"wave {seed}-{i}" for i in range(count)])


def main(*, count: int = 100, points: int = 20, steps: int = 700, progress: bool = True) -> dict[str, float]:
    """Fits, and returns the RMSE of unseen points of new tasks given 0, 5 and 10 points.

    Args:
        count: Tasks to learn from.
        points: Points of each.
        steps: Training steps.
        progress: Whether to show a bar.
    """
    optimizer = bm.Optimizer(steps=steps, batch_tasks=64, lr=0.02)
    method = bm.Amortized(shared="map", embed=network(), optimizer=optimizer)
    fit = bm.fit(Sinusoids(), waves(count, points, seed=1), method=method, progress=progress)
    print(fit)
    new, errors = waves(50, 60, seed=2), {}
    for given in (0, 5, 10):
        context, target = new.context_target(context=given, seed=0)
        post = fit.posterior(context)
        mean = post.predict(target, kind="mean").mean
        error = float(np.sqrt(np.mean((mean - target.y.numpy().reshape(mean.shape)) ** 2)))
        flagged = sum(flag != "" for flag in post.flag)
        print(f"given {given:>2} points: RMSE {error:.3f} (noise {NOISE}); {flagged} of 50 posteriors are flagged")
        errors[str(given)] = error
    return errors


if __name__ == "__main__":
    main()
