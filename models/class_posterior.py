"""A Bayesian classifier on learned features, whose posterior is read off the context class by class, as VERSA's is.

    φ_i = (w_1, …, w_K, b_1, …, b_K),  w_c ~ N(0, τ_w² I),  b_c ~ N(0, τ_b²),   P(y = c) ∝ exp(w_cᵀ h(x) + b_c)
    q(w_c, b_c | C) = N(m(h̄_c, n_c), v(h̄_c, n_c)),  the prior for a class without rows

h is a module of the model; h̄_c and n_c are the mean of the n_c context rows of class c, embedded by a module of the
guide's own that starts as a copy of h. In contrast to `versa` there is a prior, so that the answer is a `bm.Posterior`,
which the ladder can check and mend by the model's own density, and ArviZ reads.

Objective: "predictive", the held-out log density without a KL term (ML-PIP).

References:
    Gordon, Bronskill, Bauer, Nowozin, Turner: Meta-Learning Probabilistic Inference For Prediction, 2019,
    https://arxiv.org/abs/1805.09921
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.embeddings import by_class, embedded

MIXING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
HIDDEN = 64
"""Width of the networks of the posterior."""


def build(embed: nn.Module, *, features: int, classes: int) -> bm.HierarchicalModel:
    """An unfitted classifier.

    Args:
        embed: Module h `(R, *dx) -> (R, features)`, the same for all tasks; `fit` trains a copy. A row's features may
            depend on the row alone: batch normalisation and dropout have to be in evaluation mode, `embed.eval()`.
        features: Numbers that a row becomes.
        classes: Number K of classes of every task, labels 0 … K - 1.

    Returns:
        A model with the task site `phi` `(K · (features + 1),)`, weights by class and then biases, and the shared sites
        `weight_scale` and `bias_scale`, τ_w and τ_b.

    Raises:
        ValueError: If features or classes is out of range, or embed mixes rows or draws noise.
    """
    _check(embed, features, classes)

    def prior(shared: Mapping[str, Tensor]) -> Distribution:
        weights = shared["weight_scale"].expand(classes * features)
        scale = torch.cat([weights, shared["bias_scale"].expand(classes)])
        return dist.Normal(torch.zeros_like(scale), scale).to_event(1)

    scales = {"weight_scale": dist.LogNormal(0.0, 1.0), "bias_scale": dist.LogNormal(0.0, 1.0)}
    logits, labels = Logits(embed, features, classes), bm.likelihoods.Categorical(levels=classes)
    return bm.HierarchicalModel(prior, logits, labels, shared=scales)


def _check(embed: nn.Module, features: int, classes: int) -> None:
    for name, value, least in (("features", features, 1), ("classes", classes, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"class_posterior: expected {name} as a whole number ≥ {least}, got {value!r}")
    if not isinstance(embed, nn.Module):
        raise ValueError(f"class_posterior: expected embed as a module (R, *dx) -> (R, {features}), got {embed!r}")
    _refuse_mixing(embed)


def _refuse_mixing(embed: nn.Module) -> None:
    mixing = [part for part in embed.modules() if isinstance(part, MIXING) and part.training]
    if mixing:
        raise ValueError(
            f"class_posterior: {type(mixing[0]).__name__} in training mode makes the density of a row depend on other "
            "rows or on noise; call embed.eval() after pretraining, or use LayerNorm in its place"
        )


def method(
    model: bm.HierarchicalModel, *, context: tuple[int, int] | None = None, optimizer: bm.Optimizer | None = None
) -> bm.Amortized:
    """How it is fitted: `bm.fit(model, tasks, method=class_posterior.method(model))`.

    Args:
        model: What `build` made.
        context: Smallest and largest training context; None: (0, 10).
        optimizer: Steps, batch size and learning rate.

    Raises:
        ValueError: If the model is another one.
    """
    if not isinstance(model, bm.HierarchicalModel) or not isinstance(model.predictor, Logits):
        raise ValueError(f"class_posterior: expected a model that class_posterior.build made, got {model!r}")
    guide = ByClass(copy.deepcopy(model.predictor))
    return bm.Amortized(
        shared="map", objective="predictive", context=context, guide=guide, optimizer=optimizer or bm.Optimizer()
    )


class Logits(nn.Module):
    """W h(x) + b `(T, N, K)` for φ `(T, 1, d)` and x `(T, N, *dx)`."""

    def __init__(self, embed: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.embed, self.features, self.classes = embed, features, classes

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """The logits of every row."""
        weights, biases = phi.squeeze(1).split([self.classes * self.features, self.classes], -1)
        h = self.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return h @ weights.unflatten(-1, (self.classes, self.features)).mT + biases.unsqueeze(1)


class ByClass(bm.guides.TaskGuide):
    """q(φ | C), each class read off the mean of its embedded rows, in whitened coordinates: the prior is N(0, 1).

    Args:
        logits: The model's predictor; its embedding is this guide's from now on.
    """

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.embed, self.classes = logits.embed, logits.classes
        # Prototypes to begin with: in the direction of the class's mean, by a learned factor.
        self.direction = nn.Parameter(torch.tensor(0.3))
        self.mean = _network(logits.features + 1, logits.features + 1)
        self.log_sd = _network(logits.features + 1, logits.features + 1)

    def attach(self, density: Any, tasks: bm.Tasks) -> None:
        """Takes on the model's precision."""
        self.to(density.dtype)

    def prepare(self, batch: bm.Batch, data: dict[str, Tensor]) -> bm.guides.Context:
        """Means and log sds of all weights, of every task."""
        x = batch.x.to(self.direction.dtype)
        h, _ = embedded(self.embed, x, x[:, :0])
        found = by_class(h, batch, self.classes)
        known, count = (found.counts > 0).to(h.dtype).unsqueeze(-1), found.counts.unsqueeze(-1)
        told = torch.cat([found.means, count.log1p()], -1)
        start = torch.cat([self.direction * found.means, torch.zeros_like(count)], -1)
        loc, log_sd = known * (start + self.mean(told)), known * self.log_sd(told)
        return bm.guides.Context(batch, data, {"loc": _flat(loc), "log_sd": _flat(log_sd)})

    def condition(self, theta: Tensor, context: bm.guides.Context) -> bm.guides.DiagonalTasks:
        """The same for all θ: whitened coordinates are in units of τ already."""
        loc, log_sd = (context.summary[name].expand(len(theta), -1, -1) for name in ("loc", "log_sd"))
        return bm.guides.DiagonalTasks(loc, log_sd.exp())


def _flat(by_class: Tensor) -> Tensor:
    """Numbers `(T, K, features + 1)`, bias last, in the order of φ, `(T, d)`."""
    return torch.cat([by_class[..., :-1].flatten(1), by_class[..., -1]], 1)


def _network(inputs: int, outputs: int) -> nn.Sequential:
    """Two layers that start at zero."""
    last = nn.Linear(HIDDEN, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ELU(), last)
