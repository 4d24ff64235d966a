"""A family of classification tasks with a known best answer: classes are points in a few of many dimensions."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import bayesmeta as bm

SIGNAL, NUISANCE, CLASSES, EACH = 3, 12, 300, 20
SPREAD = 0.7
"""Sd of the rows of a class around its centre, whose sd is 1, in the dimensions that matter; in the others 2 of 2."""


def source(*, way: int = 4, shot: int = 1, query: int = 5, seed: int = 0) -> bm.families.ImageClasses:
    """Rows `(3, 5)`: three numbers say something about the class, twelve nothing."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(CLASSES, 1, SIGNAL)) + SPREAD * rng.normal(size=(CLASSES, EACH, SIGNAL))
    rows = np.concatenate([signal, 2.0 * rng.normal(size=(CLASSES, EACH, NUISANCE))], -1)
    labels = np.repeat(np.arange(CLASSES), EACH)
    return bm.families.ImageClasses(rows.reshape(-1, 3, 5), labels, way=way, shot=shot, query=query)


def linear(features: int = 6) -> nn.Module:
    """An embedding whose best weights keep what matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(SIGNAL + NUISANCE, features))


def oracle(episode: bm.Episode) -> torch.Tensor:
    """The exact predictive log probabilities `(T, M)` of the target labels after one context row of each class.

    The centre of a class given its row z is N(z / (1 + s²), s² / (1 + s²)), a new row has s² more.
    """
    s2 = SPREAD**2
    order = episode.context.y.argsort(1)
    shown = episode.context.x.flatten(2)[..., :SIGNAL].gather(1, order.unsqueeze(-1).expand(-1, -1, SIGNAL))
    rows = episode.target.x.flatten(2)[..., :SIGNAL]
    distance = (rows.unsqueeze(2) - shown.unsqueeze(1) / (1 + s2)).square().sum(-1)
    log_p = torch.log_softmax(-0.5 * distance / (s2 / (1 + s2) + s2), -1)
    return log_p.gather(2, episode.target.y.unsqueeze(-1)).squeeze(-1)


def evaluation(way: int = 4) -> bm.Episode:
    """300 tasks of classes that training has not seen."""
    return source(way=way, seed=1).draw(300, context=(0, 0), generator=torch.Generator().manual_seed(0))


def fitted(model: bm.ConditionalModel, steps: int, lr: float, seed: int = 0) -> bm.ConditionalFit:
    """A short training."""
    optimizer = bm.Optimizer(steps=steps, batch_tasks=16, lr=lr)
    return bm.fit(model, source(), method=bm.Amortized(optimizer=optimizer), seed=seed, progress=False)


def score(fit: bm.ConditionalFit, episode: bm.Episode) -> torch.Tensor:
    """Mean log probability of each task's target labels `(T,)`."""
    with torch.no_grad():
        return fit.model(episode.context, episode.target.x).log_prob(episode.target.y).mean(1)
