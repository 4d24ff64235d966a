"""Networks that read a task: rows become features, features are pooled, θ enters after pooling.

`RowInputs` turns a batch into standardised network inputs, the only place where data are rescaled; `MLP` is the one
multilayer perceptron. What an encoder makes of them lives in `inference/guides.py`. Networks run in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks

ONE_HOT_LEVELS = 32
"""Level columns with at most so many levels are one-hot inputs; longer ones get a learned embedding."""
EMBEDDING = 8


@dataclass
class Rows:
    """The labelled rows of a batch as network inputs.

    Attributes:
        inputs: `(R, width)`.
        segment: The task of each row `(R,)`.
        count: Rows of each task `(T,)`.
        task_inputs: `(T, task_width)`.
        weight: Likelihood weights `(R,)`, or None where all are one.
    """

    inputs: Tensor
    segment: Tensor
    count: Tensor
    task_inputs: Tensor
    weight: Tensor | None

    def whole(self) -> Tensor:
        """A one, the inputs of each row and those of its task: `(R, 1 + width + task_width)`."""
        ones = self.inputs.new_ones(len(self.inputs), 1)
        return torch.cat([ones, self.inputs, self.task_inputs[self.segment]], -1)

    def total(self, rows: Tensor) -> Tensor:
        """Weighted sum of rows `(R, *k)` within tasks: `(T, *k)`."""
        if self.weight is not None:
            rows = rows * self.weight.reshape(-1, *[1] * (rows.dim() - 1))
        return segment_sum(rows, self.segment, len(self.count))


class MLP(nn.Sequential):
    """A multilayer perceptron `sizes[0] -> … -> sizes[-1]` with SiLU between; `zero=True` starts at output zero."""

    def __init__(self, sizes: Sequence[int], *, zero: bool = False) -> None:
        layers: list[nn.Module] = []
        for width_in, width_out in zip(sizes[:-1], sizes[1:], strict=True):
            linear = nn.Linear(width_in, width_out)
            layers += [linear, nn.SiLU()]
        super().__init__(*layers[:-1])
        if zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


class Standardise(nn.Module):
    """Shifts and scales the last dimension by fixed numbers measured once: `(R, k) -> (R, k)`."""

    loc: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        rows = rows.double()
        scale = rows.std(0, correction=0) if rows.numel() else torch.ones(rows.shape[1:])
        self.register_buffer("loc", rows.mean(0).float() if len(rows) else torch.zeros(rows.shape[1:]))
        self.register_buffer("scale", torch.where(scale > 0, scale, torch.ones_like(scale)).float())

    def forward(self, rows: Tensor) -> Tensor:
        """Standardises."""
        return (rows.float() - self.loc) / self.scale


class Levels(nn.Module):
    """Codes of a level or index column `(R,)` as one-hot or learned vectors `(R, width)`."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.embedding = nn.Embedding(levels, EMBEDDING) if levels > ONE_HOT_LEVELS else None
        self.width = EMBEDDING if self.embedding is not None else levels

    def forward(self, codes: Tensor) -> Tensor:
        """Encodes."""
        codes = codes.long() % self.levels  # -1 is the last place, as in the model
        if self.embedding is not None:
            return self.embedding(codes)
        return nn.functional.one_hot(codes, self.levels).float()


class RowInputs(nn.Module):
    """Rows of a batch as network inputs.

    x, y and all columns are flattened, standardised with the training tasks' mean and sd, and concatenated; columns of
    strings and indices become levels; where labels may be missing, an indicator is added and the label is zeroed.

    Args:
        tasks: Training tasks; their means and sds are kept.
        embed: Module `(R, *dx) -> (R, k)` in place of flattening x (images).
        indices: Columns that the model takes as places in a vector ("column:name", "task_column:name"), its length.

    Attributes:
        width: Number of inputs a row; `task_width`: number of inputs a task.
        labels: Which inputs of a row are its labels.
    """

    def __init__(
        self, tasks: Tasks, *, embed: nn.Module | None = None, indices: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.embed = copy.deepcopy(embed)
        schema = tasks.schema
        levels = _levels(tasks, indices or {})
        self._missing = schema.missing
        self._x_levels = [(i, name) for i, name in enumerate(schema.x) if name in schema.levels]
        self._columns = tuple(schema.columns)
        self._task_columns = tuple(schema.task_columns)
        self.parts = nn.ModuleDict()
        widths = [self._add("x", self._plain_x(tasks.x)), self._add("y", _matrix(tasks.y))]
        self.labels = slice(widths[0], sum(widths))
        if self._missing:
            widths.append(widths[1])
        widths += [self._add_levels(f"x.{name}", len(schema.levels[name])) for _, name in self._x_levels]
        widths += [
            self._add_column(f"c.{name}", tasks.columns[name], levels.get(f"column:{name}")) for name in self._columns
        ]
        self.width = sum(widths)
        self.task_width = sum(
            self._add_column(f"t.{name}", tasks.task_columns[name], levels.get(f"task_column:{name}"))
            for name in self._task_columns
        )

    def _plain_x(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            return self.embed(x[:1].float()).detach()
        flat = _matrix(x)
        keep = [i for i in range(flat.shape[1]) if i not in {i for i, _ in self._x_levels}]
        return flat[:, keep]

    def _add(self, key: str, rows: Tensor) -> int:
        embedded = key == "x" and self.embed is not None
        self.parts[_key(key)] = nn.Identity() if embedded else Standardise(rows)
        return rows.shape[1]

    def _add_levels(self, key: str, levels: int) -> int:
        part = Levels(levels)
        self.parts[_key(key)] = part
        return part.width

    def _add_column(self, key: str, rows: Tensor, levels: int | None) -> int:
        if levels is not None:
            return self._add_levels(key, levels)
        return self._add(key, _matrix(rows))

    def forward(self, batch: Batch) -> Rows:
        """Reads the rows of a batch that carry a label."""
        tasks, rows = batch.mask.shape
        labelled = batch.mask & batch.observed.reshape(tasks, rows, -1).any(-1)
        real = labelled.reshape(-1).nonzero().squeeze(-1)
        flat = {k: t.reshape(tasks * rows, *t.shape[2:])[real] for k, t in batch.tensors.items() if _by_row(k)}
        inputs = [self._x(flat["x"])]
        y = self.parts["y"](_matrix(flat["y"]))
        if self._missing:
            seen = _matrix(flat["observed"]).float()
            inputs += [y * seen, seen]
        else:
            inputs.append(y)
        inputs += [self.parts[_key(f"x.{name}")](flat["x"][:, i]) for i, name in self._x_levels]
        inputs += [self._column(f"c.{name}", flat[f"column:{name}"]) for name in self._columns]
        named = [self._column(f"t.{n}", batch.tensors[f"task_column:{n}"].squeeze(1)) for n in self._task_columns]
        per_task = torch.cat(named, -1) if named else torch.zeros(tasks, 0)
        segment = real // rows
        count = torch.zeros(tasks).index_add_(0, segment, torch.ones(len(real)))
        return Rows(torch.cat(inputs, -1), segment, count, per_task, _weights(batch.tensors, labelled))

    def _x(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            return self.embed(x.float())
        return self.parts["x"](self._plain_x(x))

    def _column(self, key: str, values: Tensor) -> Tensor:
        part = self.parts[_key(key)]
        return part(values) if isinstance(part, Levels) else part(_matrix(values))


def _levels(tasks: Tasks, indices: Mapping[str, int]) -> dict[str, int]:
    """How many levels columns have, by "column:name" or "task_column:name": those of strings, and single indices."""
    found: dict[str, int] = {}
    for kind, columns in (("column", tasks.columns), ("task_column", tasks.task_columns)):
        for name, values in columns.items():
            key = f"{kind}:{name}"
            if name in tasks.schema.levels:
                found[key] = len(tasks.schema.levels[name])
            elif key in indices and values.dim() == 1:
                found[key] = indices[key]
    return found


def _matrix(rows: Tensor) -> Tensor:
    return rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))


def _key(name: str) -> str:
    return name.replace(".", "/")


def _by_row(key: str) -> bool:
    return key in ("x", "y", "observed") or key.startswith("column:")


def segment_sum(rows: Tensor, segment: Tensor, count: int) -> Tensor:
    """Sums rows `(R, *k)` into their tasks: `(count, *k)`."""
    return rows.new_zeros(count, *rows.shape[1:]).index_add_(0, segment, rows)


def _weights(tensors: Mapping[str, Tensor], labelled: Tensor) -> Tensor | None:
    weight = tensors.get("weight")
    if "task_weight" in tensors:
        task_weight = tensors["task_weight"].expand(labelled.shape)
        weight = task_weight if weight is None else weight * task_weight
    return None if weight is None else weight[labelled].float()
