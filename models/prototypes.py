"""Prototypical networks: a class is the mean of its embedded context rows, a row belongs to the nearest class.

With h a learned embedding and h̄_c the mean of the context rows of class c,

    p(y = c | x, C) ∝ exp(-s |h(x) - h̄_c|² / √D).

There are no task parameters: the non-parametric member of the zoo. Deviations from the paper: the scale s is learned,
so that probabilities are calibrated; a class without a context row stands at one learned distance, which makes
predictions without any context uniform.

References:
    Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, 2017, https://arxiv.org/abs/1703.05175
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import bayesmeta as bm
from bayesmeta.models.embeddings import by_class, embedded


def build(embed: nn.Module, *, classes: int | None = None, context: tuple[int, int] = (0, 10)) -> bm.ConditionalModel:
    """A prototypical network.

    Args:
        embed: Module `(R, *dx) -> (R, D)`; it is used as it is, `fit` trains a copy.
        classes: Number of classes of every task, labels 0 … classes - 1. None, for episodes whose context shows every
            class: those up to the largest label of a task's own context; the number may then differ between tasks.
        context: Smallest and largest training context, where tasks do not come from a source with sizes of its own.
    """
    return bm.ConditionalModel(Prototypes(embed, classes), context=context)


class Prototypes(nn.Module):
    """Distances to class means as a distribution of labels."""

    def __init__(self, embed: nn.Module, classes: int | None = None) -> None:
        """Holds the embedding; see `build`."""
        super().__init__()
        self.embed, self.classes = embed, classes
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_unseen = nn.Parameter(torch.zeros(()))

    def forward(self, context: bm.Batch, x: Tensor) -> Categorical:
        """Distribution of the class of each new row, batch shape `(T, M)`."""
        old, new = embedded(self.embed, context.x, x)
        found = by_class(old, context, self.classes)
        logits = -self.log_scale.exp() * squared_distance(new, found.means)
        seen = (found.counts > 0).unsqueeze(1)
        logits = torch.where(seen, logits, -self.log_unseen.exp())
        return Categorical(logits=logits.masked_fill(~found.possible.unsqueeze(1), -torch.inf))


def squared_distance(rows: Tensor, means: Tensor) -> Tensor:
    """|h - h̄_c|² / √D of rows `(T, M, D)` and means `(T, K, D)`: `(T, M, K)`."""
    squares = rows.square().sum(-1).unsqueeze(-1) + means.square().sum(-1).unsqueeze(1)
    return (squares - 2 * rows @ means.mT) / rows.shape[-1] ** 0.5
