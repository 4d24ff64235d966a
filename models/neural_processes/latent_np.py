"""Neural process: a latent variable a task, inferred from the mean of its encoded rows, and a decoder of z and x.

    q(z | C) = N(μ(r), σ(r)²),   p(y | z, x) = output(dec(z, x)).

Deviations from the paper: a learned row stands in the mean, so that an empty context has a q(z) of its own; neither the
scale of labels nor that of z has a floor; predictions are mixtures over draws of z, not one draw.

References:
    Garnelo, Schwarz, Rosenbaum, Viola, Rezende, Eslami, Teh: Neural Processes, 2018, https://arxiv.org/abs/1807.01622
"""

from __future__ import annotations

from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models.neural_processes.latent import Draws, LatentPath, LatentProcess, Objective, objective_of
from bayesmeta.models.neural_processes.outputs import Output
from bayesmeta.models.neural_processes.sets import Reader, Rows, check_sizes, initial, mlp, sizes_of


def build(
    tasks: bm.Tasks,
    *,
    output: Output | None = None,
    width: int = 128,
    depth: int = 3,
    draws: Draws | None = None,
    objective: str | Objective = "elbo",
    context: tuple[int, int] | None = None,
    seed: int = 0,
) -> bm.ConditionalModel:
    """An untrained neural process.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units.
        output: Family of the labels, one of `outputs`; None is `Normal()`.
        width: Numbers in r and in every hidden layer.
        depth: Hidden layers of encoder and of decoder.
        draws: Size of z, and its draws in training and prediction; None is z as wide as the layers.
        objective: "elbo", "iw", "ml" (see `latent`), or a function `(model, episode) -> (loss, info)`.
        context: Smallest and largest training context; None is 0 to all rows of the largest task but one.
        seed: Of the initial weights.

    Raises:
        ValueError: If an option or the tasks cannot be used.
    """
    check_sizes("latent_np", width=width, depth=depth)
    draws = Draws(width) if draws is None else draws
    with initial(seed):
        module = LatentNP(Reader(tasks, output), width, depth, draws)
    return bm.ConditionalModel(module, objective=objective_of(objective), context=sizes_of(tasks, context))


class LatentNP(LatentProcess):
    """A latent path and a decoder of z and x."""

    def __init__(self, reader: Reader, width: int, depth: int, draws: Draws) -> None:
        super().__init__(reader, LatentPath(reader.dx + reader.width, width, depth, draws.size), draws)
        self.from_z, self.from_x = nn.Linear(draws.size, width), nn.Linear(reader.dx, width, bias=False)
        self.decoder = nn.Sequential(nn.SiLU(), mlp([*[width] * depth, reader.numbers]))

    def decode_given(self, z: Tensor, rows: Rows, x: Tensor) -> Tensor:
        """See `LatentProcess`."""
        numbers: Tensor = self.decoder(self.from_z(z).unsqueeze(1) + self.from_x(x).unsqueeze(2))
        return numbers
