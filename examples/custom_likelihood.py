"""A likelihood that nobody ships: measurements rounded to a coarse grid, with the exact probability of each interval.

Instruments report readings rounded to multiples of 4 although their noise is about 1. A likelihood that ignores this
takes the rounding for noise; the exact one, a distribution of a dozen lines, does not. Noise is logistic, so that the
probability of an interval has a form that never cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

import bayesmeta as bm

GRID, MU, TAU, SCALE = 4.0, 20.0, 3.0, 0.6


class Rounded(dist.TorchDistribution):
    """A logistic rounded to multiples of g: P(y) = S(b) − S(a) = S(b) S(−a) (1 − exp(a − b)).

    S is the sigmoid, and a, b = (y ∓ g/2 − f) / s.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Rounded:
        """The same distribution over more rows."""
        return Rounded(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the interval's probability."""
        half = GRID / 2 / self.scale
        centre = (value - self.loc) / self.scale
        return logsigmoid(centre + half) + logsigmoid(half - centre) + torch.log1p(-torch.exp(-2 * half))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Rounded draws."""
        shape = self._extended_shape(sample_shape)
        noise = torch.logit(torch.rand(shape, dtype=self.loc.dtype), eps=1e-12)
        return GRID * torch.round((self.loc + self.scale * noise) / GRID)


def rounded(f: Tensor, batch: bm.Batch, shared: Mapping[str, Tensor]) -> Rounded:
    """The likelihood: a callable of any of (f, batch, shared)."""
    return Rounded(f.expand(batch.mask.shape), shared["scale"])


def instruments(count: int, seed: int) -> tuple[bm.Tasks, np.ndarray]:
    """Three to twelve rounded readings an instrument, and the true values."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(MU, TAU, count)
    y = [generator.logistic(t, SCALE, n) for t, n in zip(truth, generator.integers(3, 13, count), strict=True)]
    return bm.Tasks.from_arrays(
        None, [GRID * np.round(v / GRID) for v in y], names=[f"{seed}-{i}" for i in range(count)]
    ), truth


def main(*, count: int = 80, steps: int | None = None, progress: bool = True) -> dict[str, float]:
    """Fits, and returns the scale of the noise, its error in sds, and the share of true values within their intervals.

    Args:
        count: Instruments to learn from.
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    model = bm.HierarchicalModel(
        bm.priors.Gaussian(1, loc_scale=50.0, sd_scale=10.0),
        lambda phi, x: phi[..., 0],
        rounded,
        shared={"scale": dist.HalfNormal(5.0)},
    )
    known, _ = instruments(count, seed=1)
    fit = bm.fit(model, known, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    print(fit)
    new, truth = instruments(100, seed=2)
    lower, upper = fit.posterior(new).quantile("phi", [0.05, 0.95])[..., 0]
    inside = float(((truth > lower) & (truth < upper)).mean())
    scale, sd = float(fit.shared.mean("scale")), float(fit.shared.sd("scale"))
    naive = math.sqrt(SCALE**2 + GRID**2 / 12 * 3 / math.pi**2)
    print(f"scale of the noise {scale:.2f} ± {sd:.2f}, true {SCALE}; ignoring the rounding gives about {naive:.2f}")
    print(f"true values within their 90 % interval: {inside:.1%}")
    return {"scale": scale, "error in sds": abs(scale - SCALE) / sd, "naive": naive, "inside": inside}


if __name__ == "__main__":
    main()
