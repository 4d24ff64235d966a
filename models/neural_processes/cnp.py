"""Conditional neural process: the rows of a context are encoded, averaged, and decoded at each new x.

    r = (r_0 + Σ_j enc(x_j, y_j)) / (1 + n),   p(y | x, C) = output(dec(r, x)).

Deviations from the paper: r_0, a learned row, stands in the mean, so that an empty context has an answer and n is seen;
the scale has no floor of .1.

References:
    Garnelo, Rosenbaum, Maddison, Ramalho, Saxton, Shanahan, Teh, Rezende, Eslami: Conditional Neural Processes, 2018,
    https://arxiv.org/abs/1807.01613
"""

from __future__ import annotations

import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.models.neural_processes.outputs import Output
from bayesmeta.models.neural_processes.sets import (
    NeuralProcess,
    Pool,
    Reader,
    Rows,
    check_sizes,
    initial,
    mlp,
    sizes_of,
)


def build(
    tasks: bm.Tasks,
    *,
    output: Output | None = None,
    width: int = 128,
    depth: int = 3,
    context: tuple[int, int] | None = None,
    seed: int = 0,
) -> bm.ConditionalModel:
    """An untrained conditional neural process.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units.
        output: Family of the labels, one of `outputs`; None is `Normal()`.
        width: Numbers in r and in every hidden layer.
        depth: Hidden layers of encoder and of decoder.
        context: Smallest and largest training context; None is 0 to all rows of the largest task but one.
        seed: Of the initial weights.

    Raises:
        ValueError: If an option or the tasks cannot be used.

    Example:
        >>> import numpy
        >>> x = numpy.linspace(-1, 1, 8)[:, None]
        >>> tasks = bm.Tasks.from_arrays([x] * 4, [a * x[:, 0] for a in (1.0, 2.0, -1.0, 0.5)])
        >>> build(tasks).context
        (0, 7)
    """
    check_sizes("cnp", width=width, depth=depth)
    with initial(seed):
        return bm.ConditionalModel(ConditionalNP(Reader(tasks, output), width, depth), context=sizes_of(tasks, context))


class ConditionalNP(NeuralProcess):
    """Encoder, mean, decoder."""

    def __init__(self, reader: Reader, width: int, depth: int) -> None:
        super().__init__(reader)
        self.encoder = mlp([reader.dx + reader.width, *[width] * (depth + 1)])
        self.pool = Pool(width)
        self.decoder = mlp([width + reader.dx, *[width] * depth, reader.numbers])

    def decode(self, rows: Rows, x: Tensor) -> Tensor:
        """See `NeuralProcess`."""
        r = self.pool(self.encoder(rows.features), rows.kept).unsqueeze(1)
        numbers: Tensor = self.decoder(torch.cat([r.expand(-1, x.shape[1], -1), x], -1))
        return numbers
