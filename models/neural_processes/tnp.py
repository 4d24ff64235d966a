"""Transformer neural process with a diagonal head (TNP-D): rows are tokens, new rows attend to the context alone.

Layer l, with the same weights for the tokens c of the context and the tokens t of new rows:

    c ← block(c; keys and values c),   t ← block(t; keys and values c),   p(y | x, C) = output(head(t)).

Each new row is predicted by itself; `predict(joint=True)` feeds drawn rows back.

Deviations from the paper: a head of attention scores a row less the farther its x is, at a rate that is learned
(`near`), which on Gaussian processes saves most of the training; layer norms stand before the blocks, and a learned
token before the context, so that an empty one has an answer; new rows pass through the layers as queries only, not as
part of one masked square of attention; the scale has no floor.

References:
    Nguyen, Grover: Transformer Neural Processes: Uncertainty-Aware Meta Learning Via Sequence Modeling, 2022,
    https://arxiv.org/abs/2207.04179
    Bruinsma, Markou, Requeima, Foong, Andersson, Vaughan, Buonomo, Hosking, Turner: Autoregressive Conditional Neural
    Processes, 2023, https://arxiv.org/abs/2303.14468
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models.neural_processes.attention import Attention, Nearness, Null
from bayesmeta.models.neural_processes.outputs import Output
from bayesmeta.models.neural_processes.sets import NeuralProcess, Reader, Rows, check_sizes, initial, mlp, sizes_of


def build(
    tasks: bm.Tasks,
    *,
    output: Output | None = None,
    width: int = 64,
    depth: int = 6,
    heads: int = 4,
    near: bool = True,
    context: tuple[int, int] | None = None,
    seed: int = 0,
) -> bm.ConditionalModel:
    """An untrained transformer neural process.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units.
        output: Family of the labels, one of `outputs`; None is `Normal()`.
        width: Numbers in a token; a multiple of `heads`.
        depth: Layers.
        heads: Heads of attention.
        near: Whether distances in x count in attention; False is the paper's, and needs less memory for large sets.
        context: Smallest and largest training context; None is 0 to all rows of the largest task but one.
        seed: Of the initial weights.

    Raises:
        ValueError: If an option or the tasks cannot be used.
    """
    check_sizes("tnp", width=width, depth=depth, heads=heads)
    with initial(seed):
        module = TransformerNP(Reader(tasks, output), width, depth, heads, near)
    return bm.ConditionalModel(module, context=sizes_of(tasks, context))


class TransformerNP(NeuralProcess):
    """Tokens, layers, head."""

    def __init__(self, reader: Reader, width: int, depth: int, heads: int, near: bool) -> None:
        super().__init__(reader)
        # The last input says whether a token's label is known.
        self.embed = mlp([reader.dx + reader.width + 1, width, width, width])
        self.null = Null(width)
        self.layers = nn.ModuleList([Layer(width, heads, reader.dx if near else 0) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), mlp([width, 2 * width, reader.numbers]))

    def decode(self, rows: Rows, x: Tensor) -> Tensor:
        """See `NeuralProcess`."""
        size = 1 + rows.x.shape[1]
        known = nn.functional.pad(rows.features, (0, 1), value=1.0)
        asked = nn.functional.pad(x, (0, known.shape[-1] - x.shape[-1]))
        tokens = self.null(self.embed(torch.cat([known, asked], 1)))
        kept, squares = Null.kept(rows.kept), _squares(torch.cat([rows.x, x], 1), rows.x)
        for layer in self.layers:
            tokens = layer(tokens, size, kept, squares)
        numbers: Tensor = self.head(tokens[:, size:])
        return numbers


class Layer(nn.Module):
    """Attention of all tokens to those of the context, and a perceptron, each added to what it reads."""

    def __init__(self, width: int, heads: int, dx: int) -> None:
        super().__init__()
        self.near = Nearness(dx, heads) if dx else None
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.perceptron = mlp([width, 2 * width, width])

    def forward(self, tokens: Tensor, size: int, kept: Tensor, squares: Tensor) -> Tensor:
        """Reads and writes tokens.

        Args:
            tokens: `(T, size + M, width)`, the first `size` the context.
            size: How many tokens the context has.
            kept: Which of those are real, `(T, 1, 1, size)`.
            squares: Squared distances `(T, size + M, size, dx)`.
        """
        normed = self.before(tokens)
        context = normed[:, :size]
        mask = kept if self.near is None else self.near(squares).masked_fill(~kept, -torch.inf)
        tokens = tokens + self.attention(normed, context, context, mask)
        result: Tensor = tokens + self.perceptron(self.between(tokens))
        return result


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared differences of rows `(T, A, dx)` and `(T, B, dx)`, zero for a first row of each that has no place."""
    squares = (a.unsqueeze(2) - b.unsqueeze(1)).square()
    return nn.functional.pad(squares, (0, 0, 1, 0, 1, 0))
