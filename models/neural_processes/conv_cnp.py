"""Convolutional conditional neural process in one dimension: it moves its predictions when the rows are moved.

The context becomes functions on a grid, density and signal, which a U-Net reads; its channels, smoothed back, are
decoded:

    h_0(u) = Σ_j w(u - x_j),   h(u) = Σ_j w(u - x_j) y_j / h_0(u),   f = UNet(h_0, h),
    r(x) = Σ_u w'(u - x) f(u),   p(y | x, C) = output(dec(r(x))).

The grid of a task begins at a whole number of its coarsest cells from the lowest x of its context (of the new rows,
where it is empty), so that moving all x by a constant moves nothing else, and a prediction hardly depends on which
other rows are asked for. Points beyond a task's own grid are zero in every layer: no task's answer depends on others.

Deviations from the paper: points lie so many to an sd of the training inputs; the scale has no floor.

References:
    Gordon, Bruinsma, Foong, Requeima, Dubois, Turner: Convolutional Conditional Neural Processes, 2020,
    https://arxiv.org/abs/1910.13556
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models.arguments import check_tasks
from bayesmeta.models.neural_processes.outputs import Output
from bayesmeta.models.neural_processes.sets import NeuralProcess, Reader, Rows, check_sizes, initial, mlp, sizes_of

MOST_POINTS = 2**16
"""Of a task's grid; more do not fit into memory."""


def build(
    tasks: bm.Tasks,
    *,
    output: Output | None = None,
    width: int = 64,
    depth: int = 6,
    points: int = 64,
    margin: float = 0.1,
    context: tuple[int, int] | None = None,
    seed: int = 0,
) -> bm.ConditionalModel:
    """An untrained convolutional conditional neural process.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units; x is one number.
        output: Family of the labels, one of `outputs`; None is `Normal()`.
        width: Channels of the U-Net.
        depth: Levels of the U-Net, each half as fine as the one before.
        points: Points of the grid in one sd of the training inputs: at least some in the shortest distance over which
            labels change.
        margin: What the grid spans beyond the rows on either side, in sds of the training inputs.
        context: Smallest and largest training context; None is 0 to all rows of the largest task but one.
        seed: Of the initial weights.

    Raises:
        ValueError: If an option or the tasks cannot be used, or x is not one number.
    """
    check_sizes("conv_cnp", width=width, depth=depth, points=points)
    if not margin >= 0:
        raise ValueError(f"conv_cnp: expected margin ≥ 0, got {margin!r}")
    check_tasks("conv_cnp", tasks)
    if math.prod(tasks.schema.x_shape) != 1:
        raise ValueError(
            f"conv_cnp: expected x to be one number, got shape {tasks.schema.x_shape}; take tnp, attentive_np or cnp"
        )
    with initial(seed):
        module = ConvolutionalNP(Reader(tasks, output), width, Cells(1 / points, 2**depth, margin))
    return bm.ConditionalModel(module, context=sizes_of(tasks, context))


@dataclass(frozen=True)
class Cells:
    """Where the points of a grid lie.

    Args:
        step: Distance of two of them.
        block: How many there are in one of the coarsest cells.
        margin: What is spanned beyond the rows.
    """

    step: float
    block: int
    margin: float

    def __call__(self, rows: Rows, x: Tensor) -> tuple[Tensor, Tensor]:
        """The grid of each task `(T, G)` and which points are its own, for a context and new x `(T, M, 1)`.

        Raises:
            ValueError: If a grid has more than `MOST_POINTS`.
        """
        old, new = rows.x.squeeze(-1), x.squeeze(-1)
        first = torch.where(rows.kept, old, torch.inf).amin(1, keepdim=True)
        anchor = torch.where(first.isfinite(), first, new.amin(1, keepdim=True))
        low = torch.minimum(anchor, new.amin(1, keepdim=True)) - self.margin
        high = torch.where(rows.kept, old, -torch.inf).amax(1, keepdim=True).maximum(new.amax(1, keepdim=True))
        cell = self.step * self.block
        before = ((anchor - low) / cell).ceil()
        cells = ((high + self.margin - anchor) / cell).ceil() + before
        if float(cells.max()) * self.block > MOST_POINTS:
            raise ValueError(
                f"conv_cnp: expected a grid of at most {MOST_POINTS} points, got {float(cells.max()) * self.block:.0f} "
                f"for task {int(cells.argmax())} of a batch; look for outlying x, or build with fewer points"
            )
        place = torch.arange(int(cells.max()) * self.block).to(x)
        grid = anchor + (place - before * self.block) * self.step
        return grid, place < cells * self.block


class ConvolutionalNP(NeuralProcess):
    """Set to grid, U-Net, grid to rows."""

    def __init__(self, reader: Reader, width: int, cells: Cells) -> None:
        super().__init__(reader)
        self.cells = cells
        start = math.log(2 * cells.step)
        self.log_length_in, self.log_length_out = (nn.Parameter(torch.tensor(start)) for _ in range(2))
        self.unet = UNet(1 + reader.width, width, int(math.log2(cells.block)))
        self.decoder = mlp([width, width, reader.numbers])

    def decode(self, rows: Rows, x: Tensor) -> Tensor:
        """See `NeuralProcess`."""
        grid, own = self.cells(rows, x)
        weights = _bumps(grid, rows.x.squeeze(-1), self.log_length_in) * rows.kept.unsqueeze(1)
        density = weights.sum(-1, keepdim=True)
        signal = weights @ rows.labels / (density + 1e-8)
        f = self.unet(torch.cat([density, signal], -1).transpose(1, 2), own.to(x.dtype).unsqueeze(1))
        r = _bumps(x.squeeze(-1), grid, self.log_length_out) @ f.transpose(1, 2)
        numbers: Tensor = self.decoder(r)
        return numbers


def _bumps(a: Tensor, b: Tensor, log_length: Tensor) -> Tensor:
    """exp(-(a - b)² / 2 ℓ²), `(T, A)` and `(T, B)` -> `(T, A, B)`."""
    return torch.exp(-0.5 * ((a.unsqueeze(2) - b.unsqueeze(1)) / log_length.exp()).square())


class UNet(nn.Module):
    """Convolutions to ever coarser grids and back, `(T, channels, G)` -> `(T, width, G)`; each level sees its like."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, width, 1)
        self.down = nn.ModuleList([nn.Conv1d(width, width, 5, stride=2, padding=2) for _ in range(depth)])
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose1d(width if level == 0 else 2 * width, width, 5, stride=2, padding=2, output_padding=1)
                for level in range(depth)
            ]
        )

    def forward(self, h: Tensor, own: Tensor) -> Tensor:
        """Reads channels; `own` `(T, 1, G)` is 1 on a task's own points, which end with a coarsest cell."""
        masks, skipped = [own], [self.first(h) * own]
        for layer in self.down:
            masks.append(masks[-1][..., ::2])
            skipped.append(nn.functional.silu(layer(skipped[-1])) * masks[-1])
        h = skipped.pop()
        masks.pop()
        for layer in self.up:
            h = nn.functional.silu(layer(h)) * masks.pop()
            skip = skipped.pop()
            h = torch.cat([h, skip], 1) if skipped else h + skip
        return h
