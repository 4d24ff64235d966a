"""The rows that a family's exact inference reads: real rows first, in float64.

`Rows` is made of a `Batch`; the Gaussian processes and the curves condition on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data.batch import Batch


@dataclass(frozen=True)
class Rows:
    """Labelled rows of T tasks, the real ones of each before its padding.

    Attributes:
        x: Inputs `(T, N, dim)`, float64.
        y: Labels `(T, N)`, float64, 0 on padding.
        mask: Bool `(T, N)`: False on padding and where a label is missing.
    """

    x: Tensor
    y: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Rows:
        """Reads a batch with one label a row; rows without a label are left out."""
        return cls(batch.x.double(), batch.y.double(), batch.mask & batch.observed)._packed()

    @property
    def n(self) -> Tensor:
        """Rows of each task, `(T,)`."""
        return self.mask.sum(-1)

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, tasks: Tensor) -> Rows:
        """Returns some tasks, without the padding that they do not need."""
        return Rows(self.x[tasks], self.y[tasks], self.mask[tasks])._packed()

    def joined(self, other: Rows) -> Rows:
        """Returns the rows of both."""
        pairs = ((self.x, other.x), (self.y, other.y), (self.mask, other.mask))
        return Rows(*(torch.cat(pair, 1) for pair in pairs))._packed()

    def chunks(self, elements: int, most: int) -> Iterator[Tensor]:
        """Yields positions of tasks of similar size, so many that `elements` numbers a task make at most `most`."""
        order = self.n.argsort()
        yield from order.split(max(1, most // max(1, elements)))

    def _packed(self) -> Rows:
        widest = max(1, int(self.n.max()))
        order = (~self.mask).long().argsort(dim=1, stable=True)[:, :widest]
        mask = self.mask.gather(1, order)
        y = torch.where(mask, self.y.gather(1, order), 0.0)
        return Rows(self.x.gather(1, order.unsqueeze(-1).expand(-1, -1, self.x.shape[2])), y, mask)
