"""VERSA: a network reads the posterior of a task's linear classifier off its context.

The task parameters are φ = (w_c, b_c) for each class c, with logits h(x)ᵀ w_c + b_c. Their posterior is amortized and
does not look at other classes, so that any number of classes will do:

    q(w_c, b_c | C) = N(μ(h̄_c), σ²(h̄_c)),  h̄_c the mean of the embedded context rows of class c.

The objective is the held-out log density log (1/L) Σ_l p(y | x, φ_l) without a KL term (ML-PIP), with draws of the
logits in place of the weights (local reparametrisation). Deviations from the paper: μ starts at the classifier that
prototypes make, w_c = 2 s h̄_c / √D and b_c = -s |h̄_c|² / √D, which networks correct; sds start small; outside training
the L draws are fixed ones, so that predictions are reproducible; without any context classes are equally likely.

References:
    Gordon, Bronskill, Bauer, Nowozin, Turner: Meta-Learning Probabilistic Inference For Prediction, 2019,
    https://arxiv.org/abs/1805.09921
    Kingma, Salimans, Welling: Variational Dropout and the Local Reparameterization Trick, 2015,
    https://arxiv.org/abs/1506.02557
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

import bayesmeta as bm
from bayesmeta.models.embeddings import Classes, by_class, embedded

DRAWS = 100
"""Draws of the logits outside training."""
IMPOSSIBLE = -1e9
HIDDEN = 64
"""Width of the four networks of the posterior."""


def build(
    embed: nn.Module,
    *,
    features: int,
    classes: int | None = None,
    draws: int = 10,
    context: tuple[int, int] = (0, 10),
) -> bm.ConditionalModel:
    """A VERSA classifier.

    Args:
        embed: Module `(R, *dx) -> (R, features)`; it is used as it is, `fit` trains a copy.
        features: Numbers that a row becomes.
        classes: Number of classes of every task, labels 0 … classes - 1. None, for episodes whose context shows every
            class: those up to the largest label of a task's own context; the number may then differ between tasks.
        draws: Draws L of the logits in training.
        context: Smallest and largest training context, where tasks do not come from a source with sizes of its own.
    """
    return bm.ConditionalModel(Versa(embed, features, classes=classes, draws=draws), context=context)


class Versa(nn.Module):
    """An amortized posterior of linear classifiers, and what it predicts."""

    def __init__(self, embed: nn.Module, features: int, *, classes: int | None = None, draws: int = 10) -> None:
        """Makes the four networks of the posterior; see `build`."""
        super().__init__()
        self.embed, self.classes, self.draws = embed, classes, draws
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.weight_mean, self.bias_mean = _network(features, features, 0.0), _network(features, 1, 0.0)
        small = -math.log(features)
        self.weight_log_var, self.bias_log_var = _network(features, features, 2 * small), _network(features, 1, small)

    def forward(self, context: bm.Batch, x: Tensor) -> Categorical:
        """Distribution of the class of each new row, batch shape `(T, M)`."""
        old, new = embedded(self.embed, context.x, x)
        found = by_class(old, context, self.classes)
        loc, sd = self._logits(self._classifier(found), new)
        loc = loc.masked_fill(~found.possible.unsqueeze(1), IMPOSSIBLE)
        log_p = (torch.log_softmax(loc + sd * noise, -1) for noise in self._noise(loc))
        logits = functools.reduce(torch.logaddexp, log_p)
        blind = (found.counts.sum(-1) == 0)[:, None, None]
        return Categorical(logits=torch.where(blind, 0.0, logits))

    def classifier(self, context: bm.Batch) -> Independent:
        """The posterior of φ = (w_c, b_c): batch shape `(T,)`, event shape `(K, features + 1)`, the bias last."""
        old, _ = embedded(self.embed, context.x, context.x[:, :0])
        return self._classifier(by_class(old, context, self.classes))

    def _classifier(self, found: Classes) -> Independent:
        means, scale = found.means, self.log_scale.exp() / found.means.shape[-1] ** 0.5
        weight = scale * (2 * means + self.weight_mean(means))
        bias = scale * (self.bias_mean(means) - means.square().sum(-1, keepdim=True))
        log_var = torch.cat([self.weight_log_var(means), self.bias_log_var(means)], -1)
        return Independent(Normal(torch.cat([weight, bias], -1), (0.5 * log_var).exp()), 2)

    def _logits(self, phi: Independent, new: Tensor) -> tuple[Tensor, Tensor]:
        """Means and sds of the logits of new rows `(T, M, D)`: `(T, M, K)` each."""
        rows = torch.cat([new, torch.ones_like(new[..., :1])], -1)
        return rows @ phi.mean.mT, (rows.square() @ phi.variance.mT).sqrt()

    def _noise(self, like: Tensor) -> Tensor:
        """Standard normal draws `(L, T, M, K)`; outside training fixed ones, the same for all rows."""
        if self.training:
            return torch.randn(self.draws, *like.shape, dtype=like.dtype)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(DRAWS, 1, 1, like.shape[-1], generator=generator, dtype=like.dtype)


def _network(features: int, outputs: int, start: float) -> nn.Sequential:
    """Three layers with ELU between that start at a constant."""
    last = nn.Linear(HIDDEN, outputs)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(nn.Linear(features, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, HIDDEN), nn.ELU(), last)
