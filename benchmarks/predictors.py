"""One way to ask: what `bm.fit` returns, exact predictives and baselines as the table's `Predictor`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.checks.baselines import Baseline
from bayesmeta.hierarchy.recording import seeded
from benchmarks.scores import Predicted

Function = Callable[[bm.Batch, Tensor], Distribution]
"""(context, x `(T, M, *dx)`) -> a distribution of batch shape `(T, M)`."""
JointFunction = Callable[[bm.Batch, bm.Batch], Tensor]
"""(context, target) -> log densities of each task's rows together, `(T,)`."""


@dataclass(frozen=True)
class Direct:
    """A predictive that is computed, not trained: an oracle, the trivial predictor, Gaussian process regression.

    Attributes:
        function: The predictive of each row alone.
        joint_log_prob: Log density of rows together; None for rows that are independent.
        parameters: How many numbers were learned.
        offset: What labels are less before the functions see them.
    """

    function: Function
    joint_log_prob: JointFunction | None = None
    parameters: int = 0
    offset: float = 0.0

    def predict(self, context: bm.Tasks, target: bm.Tasks, *, draws: int, seed: int) -> Predicted:
        """See `Predictor`."""
        old, new = (self._moved(tasks.batch(slice(None)).to(dtype=torch.float64)) for tasks in (context, target))
        with seeded(seed), torch.no_grad():
            labels = self.function(old, new.x)
            rows = torch.where(new.mask, labels.log_prob(new.y), torch.nan)
            drawn = labels.sample(torch.Size((draws,)))
            mean = labels.mean.expand(new.mask.shape)

        def joint(some: bm.Tasks) -> np.ndarray:
            last = self._moved(some.batch(slice(None)).to(dtype=torch.float64))
            with torch.no_grad():
                if self.joint_log_prob is not None:
                    return self.joint_log_prob(old, last).numpy()
                return (self.function(old, last.x).log_prob(last.y) * last.mask).sum(1).numpy()

        return Predicted(rows.numpy(), mean.numpy() + self.offset, drawn.numpy() + self.offset, joint)

    def _moved(self, batch: bm.Batch) -> bm.Batch:
        return batch.replace(batch.tensors | {"y": batch.y - self.offset})


@dataclass(frozen=True)
class Conditional:
    """A `ConditionalFit`; rows are scored together one by one, each joining the context of the next.

    Attributes:
        fit: The fit.
    """

    fit: bm.ConditionalFit

    @property
    def parameters(self) -> int:
        """Weights of the module."""
        return sum(p.numel() for module in self.fit.modules.values() for p in module.parameters())

    def predict(self, context: bm.Tasks, target: bm.Tasks, *, draws: int, seed: int) -> Predicted:
        """See `Predictor`."""
        found = self.fit.predict(context, target, draws=draws, seed=seed)
        mean = self.fit.predict(context, target, kind="mean").mean

        def joint(some: bm.Tasks) -> np.ndarray:
            # Means need no draws in a chain; only the score goes row by row.
            return self.fit.predict(context, some, kind="mean", joint=True).log_prob(joint=True)

        return Predicted(found.log_prob(), mean, found.draws, joint)


@dataclass(frozen=True)
class Hierarchical:
    """A `Fit`: tasks are inferred from their context, then predicted.

    Attributes:
        fit: The fit.
        refine: As in `fit.posterior`.
        draws: Of the posterior, at least: the log of a mean over few draws is too low.
    """

    fit: bm.Fit
    refine: str = "auto"
    draws: int = 399

    @property
    def parameters(self) -> int:
        """Numbers in θ and weights of the model's modules; those of the guide too where nothing refines its answer."""
        modules = list(self.fit.modules.values()) + ([self.fit._guides.task] if self.refine == "none" else [])
        weights = sum(p.numel() for module in modules for p in module.parameters())
        return weights + sum(np.size(self.fit.shared.mean(name)) for name in self.fit.shared.names)

    def predict(self, context: bm.Tasks, target: bm.Tasks, *, draws: int, seed: int) -> Predicted:
        """See `Predictor`."""
        post = self.fit.posterior(context, draws=max(draws, self.draws), refine=self.refine, seed=seed)
        found = post.predict(target)

        def joint(some: bm.Tasks) -> np.ndarray:
            return post.predict(some).log_prob(joint=True)

        return Predicted(found.log_prob(), found.mean, found.draws[:draws], joint, tuple(post.flag))


@dataclass(frozen=True)
class Pooled:
    """No pooling or complete pooling of a hierarchical model, in the user's units.

    Attributes:
        baseline: One of `bayesmeta.checks.baselines`, which decides on the number of draws.
    """

    baseline: Baseline

    @property
    def parameters(self) -> int:
        """Numbers in θ."""
        shared = self.baseline.fit.shared
        return sum(np.size(shared.mean(name)) for name in shared.names)

    def predict(self, context: bm.Tasks, target: bm.Tasks, *, draws: int, seed: int) -> Predicted:
        """See `Predictor`."""
        (found,), flags = self.baseline.predict(context, target)
        loc, scale = self.baseline.units.y_loc, self.baseline.units.y_scale

        def joint(some: bm.Tasks) -> np.ndarray:
            return self.baseline.predict(context, some)[0][0].log_prob(joint=True) - some.sizes * math.log(scale)

        log_prob, mean, drawn = found.log_prob() - math.log(scale), loc + scale * found.mean, found.draws[:draws]
        return Predicted(log_prob, mean, loc + scale * drawn, joint, flags)


def trivial(tasks: bm.Tasks) -> Direct:
    """The normal distribution of all training labels, whatever the context and x."""
    y = tasks.y.double()
    loc, sd = float(y.mean()), float(y.std())

    def function(context: bm.Batch, x: Tensor) -> Distribution:
        return torch.distributions.Normal(x.new_full(x.shape[:2], loc), sd)

    return Direct(function, parameters=2)
