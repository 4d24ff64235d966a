"""The objective "pac-bayes": the hyper-posterior with the best PAC-Bayesian guarantee for tasks not yet seen.

It is the posterior of θ with the evidence of all tasks given less weight. `amortized.py` calls it, and hands the weight
on to the correction of θ.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.objectives import BY_DRAW, Guides, Info, Objective, Step

CANDIDATES = 8
"""Draws of the guide in an estimate of ln Z; where the guide is exact one would do."""


@dataclass(frozen=True)
class PACBayes:
    """The PAC-optimal hyper-posterior: log Q*(θ) = log p(θ) + λ / (n β + λ) Σ_i ln Z_β(D_i, θ) + const.

    Z_β(D_i, θ) = E_{φ ~ p(φ | θ)} exp(−β L_i(φ)), L_i the mean loss of the m rows of task i. Here the loss is that of
    the likelihood, −log p(y | φ, θ), and β = m_i, so that Z is the evidence p(D_i | θ) and φ has its ordinary
    posterior; in the factor β is the harmonic mean of all m_i. Another β is a weight of the tasks,
    `Tasks.from_arrays(…, task_weight=β / m)`, in training and for new tasks alike. ln Z is estimated from 8 weighted
    draws of the guide, from below, and without error where the guide is exact. With `shared="map"` the maximum of Q* is
    found; "normal" and "svgd" approximate it, and draws of θ are weighed towards Q*, not towards the posterior.

    Args:
        lam: λ, how much the guarantee relies on the number of tasks; None: n, the factor is then 1 / (β + 1). A task
            counts as one row: the hyper-prior weighs about m times as much as in the posterior. ∞: the posterior of θ.

    References:
        Rothfuss, Fortuin, Josifoski, Krause: PACOH: Bayes-Optimal Meta-Learning with PAC-Guarantees, 2021,
        https://arxiv.org/abs/2002.05551

    Raises:
        ValueError: If λ is no number > 0.
    """

    lam: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.lam, int | float) and not isinstance(self.lam, bool)
        if self.lam is not None and not (number and self.lam > 0):
            raise ValueError(f"PACBayes: lam must be a number > 0, ∞ included, or None, got {self.lam!r}")

    def share(self, tasks: Tasks) -> float:
        """The factor λ / (n β + λ) of the tasks' evidence; tasks without rows do not count."""
        beta = _confidences(tasks)
        beta = beta[beta > 0]
        n = len(beta)
        if not n or self.lam == math.inf:
            return 1.0
        lam = n if self.lam is None else self.lam
        return float(lam / (n / beta.reciprocal().mean() + lam))

    def over(self, tasks: Tasks) -> Objective:
        """The objective for these training tasks."""
        return functools.partial(_hyper_posterior, share=self.share(tasks))


def _hyper_posterior(density: TaskDensity, guides: Guides, step: Step, *, share: float) -> tuple[Tensor, Info]:
    """−E_q [log p(θ) + share · Σ_i ln Z_i − log q(θ)] a task."""
    theta = guides.shared.sample(step.draws)
    log_q = guides.shared.log_prob(theta)
    repeated = theta.unsqueeze(1).expand(-1, CANDIDATES, -1).flatten(0, 1)
    posterior = guides.task.condition(repeated, step.context)
    noise = posterior.sample()
    log_p = density.log_task.mapped(repeated, noise, step.context.data, guides.values, in_dims=BY_DRAW)
    log_weight = (log_p - posterior.log_prob(noise)).unflatten(0, (step.draws, CANDIDATES))
    log_z = log_weight.logsumexp(1) - math.log(CANDIDATES)
    evidence = step.tasks * log_z.mean(1, dtype=torch.float64)
    value = density.log_prior(theta, guides.values) + share * evidence - log_q
    return -value.mean() / step.tasks, {"log_p": log_p, "theta": repeated, "noise": noise}


def _confidences(tasks: Tasks) -> Tensor:
    """β of each task `(T,)`: its labelled rows, weighted."""
    seen = tasks.observed.reshape(len(tasks.observed), -1).any(1).double()
    seen = seen if tasks.weight is None else seen * tasks.weight
    ends = torch.cat([seen.new_zeros(1), seen.cumsum(0)])[tasks.offsets]
    return ends.diff() if tasks.task_weight is None else ends.diff() * tasks.task_weight
