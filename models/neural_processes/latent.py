"""What neural processes with a latent variable share: q(z | C), mixtures over z, and objectives that train them.

A task's uncertainty that its rows share is z, one vector a task:

    p(y_1..M | x_1..M, C) = ∫ Π_m p(y_m | z, x_m, C) q(z | C) dz.

`forward` gives each row the mixture over a fixed set of standard normal draws, so that predictions are reproducible and
the answer of a task depends on no other. All objectives score the target rows of a task together, as one log density,
and divide it by their number.

References:
    Garnelo, Schwarz, Rosenbaum, Viola, Rezende, Eslami, Teh: Neural Processes, 2018, https://arxiv.org/abs/1807.01622
    Le, Kim, Garnelo, Rosenbaum, Schwarz, Teh: Empirical Evaluation of Neural Process Objectives, 2018,
    https://bayesiandeeplearning.org/2018/papers/92.pdf
    Foong, Bruinsma, Gordon, Dubois, Requeima, Turner: Meta-Learning Stationary Stochastic Process Prediction with
    Convolutional Neural Processes, 2020, https://arxiv.org/abs/2007.01332
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

import bayesmeta as bm
from bayesmeta.models.neural_processes.outputs import mixture, positive
from bayesmeta.models.neural_processes.sets import NeuralProcess, Pool, Reader, Rows, check_sizes, mlp

Info = Mapping[str, Tensor]
Objective = Callable[[bm.ConditionalModel, Any], tuple[Tensor, Info]]


@dataclass(frozen=True)
class Draws:
    """How z is used.

    Args:
        size: Numbers in z.
        training: Draws of z a task and step.
        mixture: Draws of z that predictions are mixtures over.
    """

    size: int
    training: int = 8
    mixture: int = 64

    def __post_init__(self) -> None:
        check_sizes("latent", size=self.size, training=self.training, mixture=self.mixture)


class LatentPath(nn.Module):
    """q(z | C) = N(μ(r), σ(r)²) of the pooled rows; a subset of no rows has its own."""

    def __init__(self, inputs: int, width: int, depth: int, size: int) -> None:
        super().__init__()
        self.encoder = mlp([inputs, *[width] * (depth + 1)])
        self.pool = Pool(width)
        self.head = mlp([width, width, 2 * size])

    def forward(self, rows: Rows) -> Independent:
        """The distribution of z `(T, size)`."""
        loc, spread = self.head(self.pool(self.encoder(rows.features), rows.kept)).chunk(2, -1)
        return Independent(Normal(loc, positive(spread)), 1)


class LatentProcess(NeuralProcess):
    """A neural process with z; a subclass says in `decode_given` what a row is, given z."""

    noise: Tensor

    def __init__(self, reader: Reader, path: LatentPath, draws: Draws) -> None:
        super().__init__(reader)
        self.latent, self.draws = path, draws
        self.register_buffer("noise", torch.randn(draws.mixture, draws.size))

    def forward(self, context: bm.Batch, x: Tensor) -> Distribution:
        """The mixture over draws of z at x `(T, M, *dx)`, of batch shape `(T, M)`."""
        rows = self.reader(context)
        q: Any = self.latent(rows).base_dist
        z = q.loc.unsqueeze(1) + q.scale.unsqueeze(1) * self.noise
        return mixture(self.given(z, rows, x))

    def given(self, z: Tensor, rows: Rows, x: Tensor) -> Distribution:
        """Labels given z `(T, L, size)` and a context, at x `(T, M, *dx)`: batch shape `(T, M, L)`."""
        return self.reader.distribution(self.decode_given(z, rows, self.reader.inputs(x)))

    def decode_given(self, z: Tensor, rows: Rows, x: Tensor) -> Tensor:
        """The numbers `(T, M, L, numbers)` of new rows x `(T, M, dx)` in standard units."""
        raise NotImplementedError


def elbo(model: bm.ConditionalModel, episode: Any) -> tuple[Tensor, Info]:
    """E_q Σ_m log p(y_m | z, x_m, C) - KL(q ‖ q(z | C)) with q = q(z | C ∪ T): the neural process's own objective."""
    q, prior = _inferred(model, episode)
    log_p = _log_likelihood(model, episode, q.rsample((_draws(model),)).transpose(0, 1))
    return _loss(log_p.mean(-1) - kl_divergence(q, prior), episode)


def importance_weighted(model: bm.ConditionalModel, episode: Any) -> tuple[Tensor, Info]:
    """Importance weights: log 1/L Σ_l p(y | z_l, C) q(z_l | C) / q(z_l | C ∪ T), z_l ~ q(z | C ∪ T); above the ELBO."""
    q, prior = _inferred(model, episode)
    z = q.rsample((_draws(model),))
    weight = (prior.log_prob(z) - q.log_prob(z)).transpose(0, 1)
    log_w = _log_likelihood(model, episode, z.transpose(0, 1)) + weight
    return _loss(log_w.logsumexp(-1) - math.log(log_w.shape[-1]), episode)


def maximum_likelihood(model: bm.ConditionalModel, episode: Any) -> tuple[Tensor, Info]:
    """Maximum likelihood: log 1/L Σ_l p(y | z_l, C), z_l ~ q(z | C), which is what is predicted; encodes no target."""
    module: Any = model.module
    q = module.latent(module.reader(episode.context))
    log_p = _log_likelihood(model, episode, q.rsample((_draws(model),)).transpose(0, 1))
    return _loss(log_p.logsumexp(-1) - math.log(log_p.shape[-1]), episode)


OBJECTIVES: Mapping[str, Objective] = {"elbo": elbo, "iw": importance_weighted, "ml": maximum_likelihood}


def objective_of(name: str | Objective) -> Objective:
    """An objective by name, or one's own.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(name, str) and name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)} or a function, got {name!r}")
    return OBJECTIVES[name] if isinstance(name, str) else name


def _draws(model: bm.ConditionalModel) -> int:
    module: Any = model.module
    return int(module.draws.training)


def _inferred(model: bm.ConditionalModel, episode: Any) -> tuple[Independent, Independent]:
    """q(z | C ∪ T) and q(z | C)."""
    module: Any = model.module
    context = module.reader(episode.context)
    return module.latent(context.join(module.reader(episode.target))), module.latent(context)


def _log_likelihood(model: bm.ConditionalModel, episode: Any, z: Tensor) -> Tensor:
    """Σ_m log p(y_m | z, x_m, C) of the target rows of each task, `(T, L)`."""
    module: Any = model.module
    target = episode.target
    labels: Any = module.given(z, module.reader(episode.context), target.x)
    y = target.y.to(module.reader.y_loc.dtype).unsqueeze(2)
    log_p = torch.where(_kept(target).unsqueeze(-1), labels.log_prob(y), 0.0)
    return (log_p * target.tensors.get("weight", torch.ones(())).unsqueeze(-1)).sum(1)


def _kept(target: bm.Batch) -> Tensor:
    """Rows that are scored `(T, M)`: real ones without a missing label."""
    return target.mask & target.observed.reshape(*target.mask.shape, -1).all(-1)


def _loss(per_task: Tensor, episode: Any) -> tuple[Tensor, Info]:
    """The negative mean over tasks, in nats a row."""
    rows = _kept(episode.target).sum(-1)
    per_task = per_task / rows.clamp(min=1)
    share = (rows > 0) * episode.target.tensors.get("task_weight", torch.ones(1, 1)).squeeze(-1)
    return -(per_task * share).sum() / share.sum().clamp(min=torch.finfo(per_task.dtype).tiny), {"log_p": per_task}
