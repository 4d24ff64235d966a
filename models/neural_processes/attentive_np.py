"""Attentive neural process: each new x attends to the rows of the context; a latent variable holds what they share.

    r(x) = Σ_j a(x, x_j) v_j,   q(z | C) = N(μ(r̄), σ(r̄)²),   p(y | x, z, C) = output(dec(r(x), z, x)).

With `latent=None` it is the conditional attentive process (CANP), which has no z.

Deviations from the paper: rows are encoded each by itself, without self-attention; a learned row is attended to and
stands in the mean, so that an empty context has an answer; neither the scale of labels nor that of z has a floor;
predictions are mixtures over draws of z, not one draw.

References:
    Kim, Mnih, Schwarz, Garnelo, Eslami, Rosenbaum, Vinyals, Teh: Attentive Neural Processes, 2019,
    https://arxiv.org/abs/1901.05761
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models.arguments import check_tasks
from bayesmeta.models.neural_processes.attention import Attention, Null
from bayesmeta.models.neural_processes.latent import Draws, LatentPath, LatentProcess, Objective, objective_of
from bayesmeta.models.neural_processes.outputs import Output
from bayesmeta.models.neural_processes.sets import (
    NeuralProcess,
    Reader,
    Rows,
    check_sizes,
    initial,
    mlp,
    sizes_of,
)

DRAWS = Draws(64)


def build(
    tasks: bm.Tasks,
    *,
    output: Output | None = None,
    width: int = 128,
    depth: int = 3,
    latent: Draws | None = DRAWS,
    objective: str | Objective = "elbo",
    context: tuple[int, int] | None = None,
    seed: int = 0,
) -> bm.ConditionalModel:
    """An untrained attentive neural process.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units.
        output: Family of the labels, one of `outputs`; None is `Normal()`.
        width: Numbers in r and in every hidden layer; a multiple of 8, the number of heads.
        depth: Hidden layers of encoders and of the decoder.
        latent: Size of z, and its draws in training and prediction; None leaves z out.
        objective: "elbo", "iw", "ml" (see `latent`), or a function `(model, episode) -> (loss, info)`; without z the
            log density of each row, whatever is said here.
        context: Smallest and largest training context; None is 0 to all rows of the largest task but one.
        seed: Of the initial weights.

    Raises:
        ValueError: If an option or the tasks cannot be used.
    """
    check_sizes("attentive_np", width=width, depth=depth)
    check_tasks("attentive_np", tasks)
    sizes = sizes_of(tasks, context)
    with initial(seed):
        reader = Reader(tasks, output)
        if latent is None:
            return bm.ConditionalModel(ConditionalAttentiveNP(reader, width, depth), context=sizes)
        module = AttentiveNP(reader, width, depth, latent)
    return bm.ConditionalModel(module, objective=objective_of(objective), context=sizes)


class CrossAttention(nn.Module):
    """r(x) `(T, M, width)`: keys and queries from inputs, values from rows."""

    def __init__(self, reader: Reader, width: int, depth: int) -> None:
        super().__init__()
        self.place = mlp([reader.dx, *[width] * depth])
        self.values = mlp([reader.dx + reader.width, *[width] * (depth + 1)])
        self.null_key, self.null_value = Null(width), Null(width)
        self.attention = Attention(width, heads=8)

    def forward(self, rows: Rows, x: Tensor) -> Tensor:
        """Attends from x `(T, M, dx)`."""
        keys = self.null_key(self.place(rows.x))
        values = self.null_value(self.values(rows.features))
        r: Tensor = self.attention(self.place(x), keys, values, Null.kept(rows.kept))
        return r


class ConditionalAttentiveNP(NeuralProcess):
    """The deterministic path alone."""

    def __init__(self, reader: Reader, width: int, depth: int) -> None:
        super().__init__(reader)
        self.path = CrossAttention(reader, width, depth)
        self.decoder = mlp([width + reader.dx, *[width] * depth, reader.numbers])

    def decode(self, rows: Rows, x: Tensor) -> Tensor:
        """See `NeuralProcess`."""
        numbers: Tensor = self.decoder(torch.cat([self.path(rows, x), x], -1))
        return numbers


class AttentiveNP(LatentProcess):
    """Both paths, and a decoder of r(x), z and x."""

    def __init__(self, reader: Reader, width: int, depth: int, draws: Draws) -> None:
        super().__init__(reader, LatentPath(reader.dx + reader.width, width, depth, draws.size), draws)
        self.path = CrossAttention(reader, width, depth)
        self.from_z, self.from_row = nn.Linear(draws.size, width), nn.Linear(width + reader.dx, width, bias=False)
        self.decoder = nn.Sequential(nn.SiLU(), mlp([*[width] * depth, reader.numbers]))

    def decode_given(self, z: Tensor, rows: Rows, x: Tensor) -> Tensor:
        """See `LatentProcess`."""
        row = self.from_row(torch.cat([self.path(rows, x), x], -1))
        numbers: Tensor = self.decoder(row.unsqueeze(2) + self.from_z(z).unsqueeze(1))
        return numbers
