"""Does a predictive keep both answers where a task may be a sinusoid or a line? Judged against the exact mixture.

A task is ambiguous if either kind has a posterior probability from .1 to .9. At rows where the exact predictives of the
two kinds are far apart, a learner keeps a kind if its draws near that kind's mean are at least half as many as those of
the exact mixture; a wide normal distribution that covers both has too few near either.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.hierarchy.recording import seeded

AMBIGUOUS = (0.1, 0.9)
APART = 7.0
"""Means of the kinds differ by so many of their sds, in rows that are judged."""
NEAR = 1.28
"""Draws so many sds from the mean of a kind are near it: the middle 80 % of a normal distribution."""
KEPT = 0.5


class BothKinds:
    """The judge of `families.SinusoidOrLine`, called as `scores.Judge`.

    Args:
        family: The family; it knows the exact mixture.
    """

    def __init__(self, family: bm.families.SinusoidOrLine) -> None:
        self.family = family
        self._sinusoids = bm.families.Sinusoids(
            amplitude=family.amplitude, phase=family.phase, noise=family.noise, interval=family.interval
        )

    def __call__(self, context: bm.Tasks, target: bm.Tasks, draws: np.ndarray) -> np.ndarray:
        """Whether both kinds are kept, 0 or 1 `(task,)`; NaN where a task is not ambiguous or no row can be judged."""
        old, new = context.batch(slice(None)), target.batch(slice(None))
        share = self.family.kind_probability(old)
        whole = self.family.oracle(old, new.x)
        kinds = self._moments(old, new.x, share.unsqueeze(1))
        with seeded(0, "modes"):
            exact = whole.sample(torch.Size((len(draws),)))
        (first, first_sd), (second, second_sd) = kinds
        apart = new.mask & ((first - second).abs() > APART * 0.5 * (first_sd + second_sd))
        kept = torch.ones_like(share, dtype=torch.bool)
        for kind in kinds:
            kept &= _near(torch.from_numpy(draws), kind, apart) >= KEPT * _near(exact, kind, apart)
        judged = (share > AMBIGUOUS[0]) & (share < AMBIGUOUS[1]) & apart.any(1)
        return torch.where(judged, kept.double(), torch.nan).numpy()

    def _moments(self, context: bm.Batch, x: Tensor, share: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and sd of each kind's exact predictive, `(T, M)` each; the line's are what the mixture's leave."""
        whole, sinusoid = self.family.oracle(context, x), self._sinusoids.oracle(context, x)
        line = (whole.mean - share * sinusoid.mean) / (1 - share)
        squares = [found.variance + found.mean.square() for found in (whole, sinusoid)]
        variance = (squares[0] - share * squares[1]) / (1 - share) - line.square()
        return [(sinusoid.mean, sinusoid.stddev), (line, variance.clamp(min=0.0).sqrt())]


def _near(draws: Tensor, kind: tuple[Tensor, Tensor], apart: Tensor) -> Tensor:
    """Share of draws near a kind's mean, averaged over the rows that are judged, `(T,)`."""
    near = ((draws - kind[0]).abs() < NEAR * kind[1]).double().mean(0)
    return (near * apart).sum(1) / apart.sum(1).clamp(min=1)
