"""A distribution of each row alone that is a mixture over the nodes of a grid: what oracles return.

The components are described compactly, task by task, and spread out over tasks, rows and nodes only in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints

ELEMENTS = 1 << 20
"""Numbers (tasks × rows × nodes) that are spread out at once."""


class Components(Protocol):
    """The components of a mixture for T tasks, M rows and K nodes."""

    @property
    def rows(self) -> int:
        """M."""

    def part(self, tasks: slice) -> Components:
        """Returns some of the tasks."""

    def log_prob(self, y: Tensor) -> Tensor:
        """Log densities `(…, T, M, K)` of labels `(…, T, M, 1)`."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Means and variances, `(T, M, K)` each."""

    def draw(self, node: Tensor) -> Tensor:
        """Draws labels `(S, T, M)` from the components at nodes `(S, T, M)`."""


class Mixture(Distribution):
    """Σ_k w_k p_k(y) of each row alone, the weights those of the row's task; batch shape `(T, M)`, float64."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real

    def __init__(self, log_weight: Tensor, components: Components) -> None:
        """Mixes components.

        Args:
            log_weight: Log weights of the nodes `(T, K)`, up to a constant for each task.
            components: Their distributions.
        """
        self.log_weight, self.components = log_weight.log_softmax(-1), components
        super().__init__(torch.Size((len(log_weight), components.rows)))

    @property
    def mean(self) -> Tensor:
        """Means `(T, M)`."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Variances `(T, M)`."""
        return self._moments()[1]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log densities `(…, T, M)` of labels of that shape."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        labels = value.double().expand(shape).unsqueeze(-1)
        return torch.cat(
            [
                (log_weight + part.log_prob(labels[..., tasks, :, :])).logsumexp(-1)
                for tasks, log_weight, part in self._parts()
            ],
            dim=-2,
        )

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draws `(*sample_shape, T, M)`, rows independently."""
        shape = self._extended_shape(torch.Size(sample_shape))
        tasks, rows = self.batch_shape
        draws = shape.numel() // max(1, tasks * rows)
        with torch.no_grad():
            node = self.log_weight.exp().multinomial(draws * rows, replacement=True)
            return self.components.draw(node.reshape(tasks, draws, rows).transpose(0, 1)).reshape(shape)

    def _moments(self) -> tuple[Tensor, Tensor]:
        pairs = []
        for _, log_weight, part in self._parts():
            weight, (mean, variance) = log_weight.exp(), part.moments()
            centre = (weight * mean).sum(-1)
            pairs.append((centre, (weight * (variance + (mean - centre.unsqueeze(-1)).square())).sum(-1)))
        means, variances = zip(*pairs, strict=True)
        return torch.cat(means), torch.cat(variances)

    def _parts(self) -> Iterator[tuple[slice, Tensor, Components]]:
        """Yields some tasks at a time, the log weights of their nodes `(t, 1, K)`, and their components."""
        tasks, nodes = self.log_weight.shape
        step = max(1, ELEMENTS // max(1, nodes * self.components.rows))
        for start in range(0, tasks, step):
            chosen = slice(start, start + step)
            yield chosen, self.log_weight[chosen].unsqueeze(1), self.components.part(chosen)


@dataclass(frozen=True)
class Normals:
    """Normal components.

    Attributes:
        loc: Means `(T, M, K)`.
        sd: Standard deviations `(T, M, K)`.
    """

    loc: Tensor
    sd: Tensor

    @property
    def rows(self) -> int:
        """M."""
        return self.loc.shape[1]

    def part(self, tasks: slice) -> Normals:
        """Returns some of the tasks."""
        return Normals(self.loc[tasks], self.sd[tasks])

    def log_prob(self, y: Tensor) -> Tensor:
        """Log densities `(…, T, M, K)`."""
        return Normal(self.loc, self.sd).log_prob(y)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Means and variances."""
        return self.loc, self.sd.square()

    def draw(self, node: Tensor) -> Tensor:
        """Draws labels `(S, T, M)`."""
        loc, sd = (
            value.expand(len(node), *value.shape).gather(-1, node.unsqueeze(-1)) for value in (self.loc, self.sd)
        )
        return torch.normal(loc, sd).squeeze(-1)


def mixture_of_normals(log_weight: Tensor, loc: Tensor, sd: Tensor) -> Distribution:
    """Mixes normal distributions.

    Args:
        log_weight: Log weights `(T, K)`, up to a constant.
        loc: Means `(T, M, K)`.
        sd: Standard deviations `(T, M, K)`.

    Returns:
        A distribution of batch shape `(T, M)`; with one node a `Normal`.
    """
    if log_weight.shape[1] == 1:
        return Normal(loc.squeeze(-1), sd.squeeze(-1))
    return Mixture(log_weight, Normals(loc, sd))
