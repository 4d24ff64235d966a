"""Contexts as sets: rows in standard units for the networks, pooling that an empty set does not break, the base module.

A row is a pair (x, y); an image is the set of its pixels (`pixel_tasks`). Masked rows never count. Labels that are
missing are zeroed, with an indicator where a row has several.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.arguments import check_tasks
from bayesmeta.models.neural_processes.outputs import Normal, Output


@dataclass(frozen=True)
class Rows:
    """Rows of T tasks in standard units.

    Attributes:
        x: Inputs `(T, N, dx)`.
        labels: What is read of the labels `(T, N, k)`.
        kept: Bool `(T, N)`: real rows with a label.
    """

    x: Tensor
    labels: Tensor
    kept: Tensor

    @property
    def features(self) -> Tensor:
        """Inputs and labels `(T, N, dx + k)`."""
        return torch.cat([self.x, self.labels], -1)

    def join(self, other: Rows) -> Rows:
        """The rows of both."""
        pairs = ((self.x, other.x), (self.labels, other.labels), (self.kept, other.kept))
        return Rows(*(torch.cat(pair, 1) for pair in pairs))


class Reader(nn.Module):
    """Standard units of the training tasks: batches in, distributions of labels out.

    Args:
        tasks: Training tasks; means and sds of their inputs and labels are kept.
        output: The family of the labels.

    Attributes:
        dx: Numbers of an input.
        width: Numbers that are read of a row's labels.
        numbers: Numbers that a decoder gives for a row.

    Raises:
        ValueError: If inputs are text, no label is observed, or labels lie outside the support.
    """

    x_loc: Tensor
    x_scale: Tensor
    y_loc: Tensor
    y_scale: Tensor

    def __init__(self, tasks: bm.Tasks, output: Output | None = None) -> None:
        super().__init__()
        self.output = Normal() if output is None else output
        check_tasks("neural process", tasks)
        _check(tasks, self.output)
        labels = math.prod(tasks.schema.y_shape)
        self.indicate = tasks.schema.missing and labels > 1
        self.dx = max(1, math.prod(tasks.schema.x_shape))
        self.width = labels * (self.output.inputs + self.indicate)
        self.numbers = self.output.numbers(labels)
        units = _units(tasks.x.flatten(1)), _units(tasks.y, tasks.observed)
        for name, (loc, scale) in zip("xy", units, strict=True):
            self.register_buffer(f"{name}_loc", loc.to(torch.get_default_dtype()))
            self.register_buffer(f"{name}_scale", scale.to(torch.get_default_dtype()))

    def forward(self, batch: bm.Batch) -> Rows:
        """The rows of a batch; columns, task columns and weights are not read."""
        seen = batch.observed.reshape(*batch.mask.shape, -1)
        y = self.output.read(batch.y.to(self.y_loc.dtype), self.y_loc, self.y_scale)
        y = y.reshape(*seen.shape, -1) * seen.unsqueeze(-1)
        labels = torch.cat([y.flatten(2), seen.to(y.dtype)], -1) if self.indicate else y.flatten(2)
        return Rows(self.inputs(batch.x), labels, batch.mask & seen.any(-1))

    def inputs(self, x: Tensor) -> Tensor:
        """Inputs `(T, M, *dx)` in standard units, `(T, M, dx)`; a constant where there are none."""
        flat = x.to(self.x_loc.dtype).flatten(2)
        return (flat - self.x_loc) / self.x_scale if flat.shape[-1] else flat.new_ones(*flat.shape[:-1], 1)

    def distribution(self, numbers: Tensor) -> Distribution:
        """The distribution of labels, in the user's units, of batch shape `(…)` for numbers `(…, numbers)`."""
        return self.output.distribution(numbers, self.y_loc, self.y_scale)


def _units(values: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and sd of each column; a constant keeps its scale."""
    values = values.double() if observed is None else values.double().where(observed, torch.nan)
    loc = values.nanmean(0)
    scale = (values - loc).square().nanmean(0).sqrt()
    return loc, torch.where(scale > 0, scale, 1.0)


def _check(tasks: bm.Tasks, output: Output) -> None:
    text = [name for name in tasks.schema.x if name in tasks.schema.levels]
    if text:
        raise ValueError(f"expected inputs that are numbers, got text in {text}; give a 0/1 column for each level")
    if not isinstance(output, Output):
        raise ValueError(f"output: expected one of bm.models.neural_processes.outputs, got {output!r}")
    if len(tasks.y) == 0 or not bool(tasks.observed.any(0).all()):
        raise ValueError("expected tasks with labels of every output, which give its units, got an output without any")
    output.check(tasks)


class NeuralProcess(nn.Module):
    """A map from a context to a distribution of each new row alone; a subclass says how in `decode`."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, context: bm.Batch, x: Tensor) -> Distribution:
        """The distribution of the labels at x `(T, M, *dx)`, of batch shape `(T, M)`."""
        return self.reader.distribution(self.decode(self.reader(context), self.reader.inputs(x)))

    def decode(self, rows: Rows, x: Tensor) -> Tensor:
        """The numbers `(T, M, numbers)` of new rows x `(T, M, dx)` in standard units."""
        raise NotImplementedError


class Pool(nn.Module):
    """The mean of encoded rows `(T, N, width)` and one learned row, the answer to an empty set: `(T, width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(width) / math.sqrt(width))

    def forward(self, encoded: Tensor, kept: Tensor) -> Tensor:
        """Pools the rows that are kept."""
        total = (encoded * kept.unsqueeze(-1)).sum(1)
        result: Tensor = (self.null + total) / (1 + kept.sum(1, keepdim=True))
        return result


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """A multilayer perceptron `sizes[0] -> … -> sizes[-1]` with SiLU between."""
    layers: list[nn.Module] = []
    for width_in, width_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@contextlib.contextmanager
def initial(seed: int) -> Iterator[None]:
    """Draws initial weights from `seed`, and gives the caller's random state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def sizes_of(tasks: bm.Tasks, context: tuple[int, int] | None) -> tuple[int, int]:
    """Context sizes to train on: those asked for, or 0 to all rows but one."""
    return (0, max(0, int(tasks.sizes.max()) - 1)) if context is None else context


def check_sizes(owner: str, **numbers: Any) -> None:
    """Refuses options that are no whole numbers ≥ 1.

    Raises:
        ValueError: With the name and value.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: expected {name} as a whole number ≥ 1, got {value!r}")
