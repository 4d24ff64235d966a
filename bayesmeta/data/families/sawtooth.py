"""Sawtooth waves: a family whose Bayes-optimal predictive is not known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data.families.base import Family, Interval, check_dim, check_intervals, normal, uniform


@dataclass(frozen=True, kw_only=True)
class Sawtooth(Family):
    """y = f (dᵀ x − s) mod 1 + noise ε, d a random direction, f s uniform on 0 … 1. It has no oracle.

    Truth: "frequency" f `(task,)`, "direction" d `(task, dim)`, "offset" s `(task,)`.

    Attributes:
        dim: Inputs of a row.
        frequency: Interval of f √dim, uniform.
        noise: Standard deviation of labels.
        interval: Interval of each input of contexts, uniform.
        target_interval: Likewise of targets; None for the same.
        context_rows: Rows of an episode's context; the paper has (0, 75 dim) with several inputs.
        target_rows: Rows of an episode's target.

    Raises:
        ValueError: If an interval is empty, or `dim` or the noise out of range.

    References:
        Bruinsma et al.: Autoregressive Conditional Neural Processes, 2023, https://arxiv.org/abs/2303.14468
    """

    dim: int = 1
    frequency: Interval = (2.0, 4.0)
    noise: float = 0.0
    interval: Interval = (-2.0, 2.0)
    target_interval: Interval | None = None
    context_rows: int | tuple[int, int] = (0, 30)
    target_rows: int | tuple[int, int] = 100

    def __post_init__(self) -> None:
        target = self.target_interval or self.interval
        check_intervals("Sawtooth", frequency=self.frequency, interval=self.interval, target_interval=target)
        check_dim("Sawtooth", self.dim)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"Sawtooth: expected noise as a number from 0, got {self.noise!r}")

    def inputs(self, tasks: int, rows: int, generator: torch.Generator, *, target: bool = False) -> Tensor:
        """Draws inputs, uniform."""
        interval = (target and self.target_interval) or self.interval
        return uniform((tasks, rows, self.dim), interval, generator)

    def labels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws sawtooth waves at inputs `(T, N, dim)`."""
        frequency = uniform((len(x), 1), self.frequency, generator) / math.sqrt(self.dim)
        direction = torch.nn.functional.normalize(normal((len(x), self.dim), generator), dim=-1)
        offset = uniform((len(x), 1), (0.0, 1.0), generator) / frequency
        along = (x @ direction.unsqueeze(-1)).squeeze(-1)
        y = (frequency * (along - offset)) % 1.0 + self.noise * normal(x.shape[:2], generator)
        return y, {"frequency": frequency[:, 0], "direction": direction, "offset": offset[:, 0]}
