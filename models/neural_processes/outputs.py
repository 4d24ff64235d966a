"""What a neural process says of a label: the numbers of its decoder as a distribution in the user's units.

A family is told the location and scale of the training labels and maps standard units back by an affine change of its
parameters, so that log scores are those of the labels themselves. No scale has a floor but `TINY` of the labels' sd,
which float32 needs. A label of shape dy has independent entries given the numbers, but for `NormalMixture`.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm

TINY = 1e-6
"""The smallest scale, in sds of the training labels."""
_ONE = math.log(math.e - 1)
"""softplus is 1 here: an untrained decoder predicts the scale of all labels."""


class Output(abc.ABC):
    """A family of distributions of a label.

    Attributes:
        inputs: Numbers by which a network reads one label.
        codes: How many codes 0, 1, … labels may be; 0 for real labels.
    """

    inputs = 1
    codes = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def read(self, y: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Labels `(T, N, *dy)` as network inputs `(T, N, *dy, inputs)`; by default in standard units."""
        return ((y - loc) / scale).unsqueeze(-1)

    @abc.abstractmethod
    def numbers(self, labels: int) -> int:
        """How many numbers a row takes that has so many labels."""

    @abc.abstractmethod
    def distribution(self, numbers: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """The distribution of labels.

        Args:
            numbers: `(…, numbers)`, around 0 before training.
            loc: Means of the training labels `(*dy)`.
            scale: Their sds `(*dy)`.

        Returns:
            A distribution of batch shape `(…)` and event shape dy.
        """

    def check(self, tasks: bm.Tasks) -> None:
        """Refuses labels outside the support.

        Raises:
            ValueError: With the task and the cure.
        """
        if not self.codes:
            return
        bad = tasks.observed & ((tasks.y != tasks.y.round()) | (tasks.y < 0) | (tasks.y >= self.codes))
        rows = bad.reshape(len(bad), -1).any(1).nonzero()
        if len(rows):
            row = int(rows[0])
            task = tasks.names[int(torch.searchsorted(tasks.offsets, row, right=True)) - 1]
            raise ValueError(
                f"{type(self).__name__}: expected labels 0 … {self.codes - 1}, got {tasks.y[row].tolist()} in task "
                f"{task!r}; recode the labels, or choose another output"
            )


def positive(number: Tensor) -> Tensor:
    """A scale: 1 at 0, never 0."""
    return torch.nn.functional.softplus(number + _ONE) + TINY


def mixture(components: Distribution) -> Distribution:
    """The mixture, in equal parts, over the last dimension of the batch shape."""
    weights = torch.zeros(1, dtype=torch.get_default_dtype()).expand(components.batch_shape)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=weights), components)


def _row(distribution: Distribution, loc: Tensor) -> Distribution:
    """The labels of a row as one event."""
    return torch.distributions.Independent(distribution, loc.dim()) if loc.dim() else distribution


class Normal(Output):
    """N(μ, σ²)."""

    def numbers(self, labels: int) -> int:
        """Two a label."""
        return 2 * labels

    def distribution(self, numbers: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """See `Output`."""
        mean, spread = numbers.unflatten(-1, (2, *loc.shape)).unbind(-1 - loc.dim())
        return _row(torch.distributions.Normal(loc + scale * mean, scale * positive(spread)), loc)


@dataclass(frozen=True)
class NormalMixture(Output):
    """Σ_k π_k N(μ_k, diag σ_k²); the labels of a row share the component. For answers with several modes.

    Args:
        components: How many; before training they stand at quantiles of the training labels.
    """

    components: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.components, int) or self.components < 1:
            raise ValueError(f"NormalMixture: expected components as a whole number ≥ 1, got {self.components!r}")

    def numbers(self, labels: int) -> int:
        """Two a label and component, and the weights."""
        return self.components * (1 + 2 * labels)

    def distribution(self, numbers: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """See `Output`."""
        logits, rest = numbers.tensor_split([self.components], -1)
        mean, spread = rest.unflatten(-1, (2, self.components, *loc.shape)).unbind(-2 - loc.dim())
        levels = (torch.arange(self.components).to(numbers) + 0.5) / self.components
        mean = mean + torch.special.ndtri(levels).reshape(-1, *[1] * loc.dim())
        parts = _row(torch.distributions.Normal(loc + scale * mean, scale * positive(spread)), loc)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), parts)


class StudentT(Output):
    """t(ν, μ, σ), ν > 1 predicted too: labels with outliers."""

    def numbers(self, labels: int) -> int:
        """Three a label."""
        return 3 * labels

    def distribution(self, numbers: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """See `Output`."""
        mean, spread, freedom = numbers.unflatten(-1, (3, *loc.shape)).unbind(-1 - loc.dim())
        # Starts at ν = 5.
        freedom = 1 + 4 * positive(freedom)
        return _row(torch.distributions.StudentT(freedom, loc + scale * mean, scale * positive(spread)), loc)


class Bernoulli(Output):
    """Labels 0 and 1."""

    codes = 2

    def read(self, y: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """As -1 and 1."""
        return (2 * y - 1).to(loc.dtype).unsqueeze(-1)

    def numbers(self, labels: int) -> int:
        """One a label."""
        return labels

    def distribution(self, numbers: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """See `Output`."""
        return _row(torch.distributions.Bernoulli(logits=numbers.reshape(*numbers.shape[:-1], *loc.shape)), loc)


@dataclass(frozen=True)
class Categorical(Output):
    """Classes 0 … classes - 1.

    Args:
        classes: How many.
    """

    classes: int

    def __post_init__(self) -> None:
        if not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(f"Categorical: expected classes as a whole number ≥ 2, got {self.classes!r}")

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """One a class."""
        return self.classes

    @property
    def codes(self) -> int:  # type: ignore[override]
        """One a class."""
        return self.classes

    def read(self, y: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """As indicators of the classes."""
        return torch.nn.functional.one_hot(y.long(), self.classes).to(loc.dtype)

    def numbers(self, labels: int) -> int:
        """One a label and class."""
        return labels * self.classes

    def distribution(self, numbers: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
        """See `Output`."""
        logits = numbers.reshape(*numbers.shape[:-1], *loc.shape, self.classes)
        return _row(torch.distributions.Categorical(logits=logits), loc)
