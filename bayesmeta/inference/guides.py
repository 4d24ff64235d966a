"""The default guide: every row adds natural parameters to a Gaussian that starts at the prior.

In whitened coordinates the posterior of a task is N(Λ⁻¹η, Λ⁻¹) with `η = Σ_j W(θ) h_j` and
`Λ = I + Σ_j Σ_m g_m(j) c_m(θ) c_m(θ)ᵀ + C(θ) (Σ_j v_j v_jᵀ) C(θ)ᵀ`, which is exact for linear Gaussian tasks and for a
task without rows; a residual head, zero at the start and at n = 0, mends what is not additive. Rows are encoded once,
θ enters after pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.networks import MLP, RowInputs
from bayesmeta.inference.adaptation import Variational as Variational
from bayesmeta.inference.diagonal_svgd import DiagonalSVGD as DiagonalSVGD
from bayesmeta.inference.exact import ExactGuide
from bayesmeta.inference.gaussian import DiagonalTasks as DiagonalTasks
from bayesmeta.inference.gaussian import Lower, NaturalTasks
from bayesmeta.inference.gradient import Gradient as Gradient
from bayesmeta.inference.loadings import ThetaStandardiser
from bayesmeta.inference.protocols import Context as Context
from bayesmeta.inference.protocols import TaskGuide as TaskGuide
from bayesmeta.inference.svgd import SVGD as SVGD

QUADRATIC_INPUTS = 12
"""Up to so many row inputs, their products join the learned features: linear Gaussian tasks are then exact."""
Exact = ExactGuide
MAX_BEND = 5.0
"""Bound on the log scale by which the residual head bends a precision."""


class JointLoadings(nn.Module):
    """Matrices `(rows, cols)` as one smooth function of θ: constants plus the output of one perceptron.

    Args:
        dim: Number of shared parameters.
        rows: Rows of every matrix.
        cols: Columns of each matrix.
        initial_sd: Of the entries of each matrix.
        hidden: Width of the perceptron.
    """

    def __init__(self, dim: int, rows: int, cols: Sequence[int], *, initial_sd: Sequence[float], hidden: int) -> None:
        super().__init__()
        self._cols = list(cols)
        start = [sd * torch.randn(rows, count) for sd, count in zip(initial_sd, cols, strict=True)]
        self.constant = nn.Parameter(torch.cat(start, -1))
        self.net = MLP([dim, hidden, rows * sum(cols)], zero=True) if dim else None

    def forward(self, theta: Tensor) -> tuple[Tensor, ...]:
        """`(S, d_theta)` -> `(rows, S, cols)` for each matrix."""
        joint = self.constant.unsqueeze(1)
        if self.net is None:
            joint = joint.expand(-1, len(theta), -1)
        else:
            joint = joint + self.net(theta).unflatten(-1, self.constant.shape).transpose(0, 1)
        return joint.split(self._cols, -1)


class Residual(nn.Module):
    """What is not additive: `size` numbers a θ and task, zero at the start, from a task's summary and θ.

    The first layer is taken apart, so that the pairs of its inputs are never built.
    """

    def __init__(self, task_width: int, theta_width: int, size: int, *, hidden: int) -> None:
        super().__init__()
        self.task = nn.Linear(task_width, hidden)
        self.theta = nn.Linear(theta_width, hidden, bias=False) if theta_width else None
        self.out = nn.Linear(hidden, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, task: Tensor, theta: Tensor) -> Tensor:
        """`task (T, hidden)`, already through the layer `task`, and `theta (S, d_theta)` -> `(size, S, T)`."""
        hidden = task.mT.unsqueeze(1).expand(-1, len(theta), -1)
        if self.theta is not None:
            hidden = hidden + self.theta(theta).mT.unsqueeze(-1)
        hidden = nn.functional.silu(hidden)
        flat = torch.addmm(self.out.bias.unsqueeze(-1), self.out.weight, hidden.flatten(1))
        return flat.unflatten(-1, hidden.shape[1:])


class NaturalGuide(TaskGuide):
    """The default guide q(φ | D, θ).

    Args:
        features: Learned features a row.
        directions: Rank-one precision terms M.
        hidden: Width of the perceptrons.
        embed: Module `(R, *dx) -> (R, k)` for images and the like.
    """

    pairs: Tensor
    pick: Tensor

    def __init__(
        self, *, features: int = 24, directions: int = 12, hidden: int = 32, embed: nn.Module | None = None
    ) -> None:
        super().__init__()
        self._features, self._directions, self._hidden, self._embed = features, directions, hidden, embed

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the networks for the model's dimensions and the tasks' columns."""
        dim, theta_dim = density.structure.task_size, density.structure.shared_size
        self._dim, self._dtype = dim, density.dtype
        self.inputs = RowInputs(tasks, embed=self._embed, indices=density.index_columns)
        width = self.inputs.width + self.inputs.task_width + 1
        self._quadratic = width <= QUADRATIC_INPUTS
        self.register_buffer("pairs", torch.triu_indices(width, width))
        self.register_buffer("pick", _pick(self.pairs, width))
        self.typical = max(1.0, float(tasks.sizes.mean()))
        fixed = self.pairs.shape[1] if self._quadratic else width
        sums = self._features + fixed
        self._widths = [sums, self._directions, self.pairs.shape[1]]
        self.row_net = MLP([width, self._hidden, self._hidden, self._features + self._directions + 1])
        self.theta = ThetaStandardiser(theta_dim)
        self.loadings = JointLoadings(
            theta_dim,
            dim,
            [sums, self._directions, width],
            initial_sd=[0.1 / math.sqrt(sums), 0.3, 0.3],
            hidden=2 * self._hidden,
        )
        task_width = sums + self._directions + 1 + self.inputs.task_width
        self.residual = Residual(task_width, theta_dim, dim + dim * (dim + 1) // 2, hidden=self._hidden)

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Standardises θ with q(θ)'s location and scale from now on."""
        self.theta.follow(loc, scale)

    def prepare(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """Encodes the rows and sums them within tasks."""
        rows = self.inputs(batch)
        inputs = rows.whole()
        features, gates = self.row_net(inputs).split([self._features, self._directions + 1], -1)
        gates = -nn.functional.logsigmoid(-gates)
        products = inputs[:, self.pairs[0]] * inputs[:, self.pairs[1]]
        fixed = products if self._quadratic else inputs
        terms = torch.cat([features, fixed, gates[:, :-1], products * gates[:, -1:]], -1)
        sums, gated, outer = (rows.total(terms) / self.typical).split(self._widths, -1)
        count = rows.count.unsqueeze(-1)
        mean = torch.cat([sums, gated], -1) * (self.typical / count.clamp(min=1))
        known = torch.cat([mean, count.log1p(), rows.task_inputs], -1)
        summary = {"sums": sums, "gates": gated, "outer": outer, "count": rows.count, "task": rows.task_inputs}
        summary |= {"precision": torch.cat([gated, outer], -1), "residual": self.residual.task(known)}
        return Context(batch, data, summary)

    def condition(self, theta: Tensor, context: Context) -> NaturalTasks:
        """q(φ | D, θ) of every task for every θ."""
        theta = self.theta(theta)
        summary = context.summary
        weights, directions, linear = self.loadings(theta)
        eta = (weights.flatten(0, 1) @ summary["sums"].mT).unflatten(0, weights.shape[:2])
        coefficient = torch.cat([directions.unsqueeze(1) * directions, self._products(linear)], -1)
        precision = (coefficient.flatten(0, 2) @ summary["precision"].mT).unflatten(0, coefficient.shape[:3])
        identity = torch.eye(self._dim, dtype=self._dtype).unsqueeze(-1).unsqueeze(-1)
        lower = Lower.cholesky(precision.to(self._dtype) + identity)
        count = summary["count"]
        bent = (self.residual(summary["residual"], theta) * (count / (count + 1))).to(self._dtype)
        shift, bend = bent.split([self._dim, len(bent) - self._dim])
        half = lower.solve(eta.to(self._dtype))
        return NaturalTasks(half, shift, lower, Lower.identity_at_zero(bend, bound=MAX_BEND))

    def _products(self, linear: Tensor) -> Tensor:
        """Coefficients of the distinct entries of Σ_j v_j v_jᵀ in C (Σ_j v_j v_jᵀ) Cᵀ: `(d, d, S, pairs)`."""
        first, second = (linear @ self.pick).split(self.pairs.shape[1], -1)
        products = first.unsqueeze(1) * second
        return products + products.transpose(0, 1)


def _pick(pairs: Tensor, width: int) -> Tensor:
    """Maps a vector v to v_k / (1 or, if k = l, 2) and v_l for each pair (k, l): `(width, 2 pairs)`."""
    first, second = nn.functional.one_hot(pairs, width).mT.float()
    return torch.cat([first * torch.where(pairs[0] == pairs[1], 0.5, 1.0), second], -1)
