"""The default guide: every row adds natural parameters to a Gaussian that starts at the prior.

In whitened coordinates the posterior of a task is N(Λ⁻¹η, Λ⁻¹) with `η = Σ_j W(θ) h_j` and
`Λ = I + Σ_j Σ_m g_m(j) c_m(θ) c_m(θ)ᵀ + C(θ) (Σ_j v_j v_jᵀ) C(θ)ᵀ`, which is exact for linear Gaussian tasks and for a
task without rows; a residual head, zero at the start and at n = 0, mends what is not additive. Rows are encoded once,
θ enters after pooling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.networks import MLP, RowInputs, Rows
from bayesmeta.inference.gaussian import GaussianTasks, cholesky, solve_lower, solve_upper
from bayesmeta.inference.gradient import Gradient as Gradient
from bayesmeta.inference.loadings import Loadings, ThetaStandardiser
from bayesmeta.inference.protocols import Context, TaskGuide

QUADRATIC_INPUTS = 12
"""Up to so many row inputs, their products join the learned features: linear Gaussian tasks are then exact."""
MAX_BEND = 5.0
"""Bound on the log scale by which the residual head bends a precision."""


class NaturalGuide(TaskGuide):
    """The default guide q(φ | D, θ).

    Args:
        features: Learned features a row.
        directions: Rank-one precision terms M.
        hidden: Width of the perceptrons.
        embed: Module `(R, *dx) -> (R, k)` for images and the like.
    """

    def __init__(
        self, *, features: int = 24, directions: int = 12, hidden: int = 32, embed: nn.Module | None = None
    ) -> None:
        super().__init__()
        self._features, self._directions, self._hidden, self._embed = features, directions, hidden, embed

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the networks for the model's dimensions and the tasks' columns."""
        dim, theta_dim = density.structure.task_size, density.structure.shared_size
        self.inputs = RowInputs(tasks, embed=self._embed)
        width = self.inputs.width + self.inputs.task_width + 1
        self._quadratic = width <= QUADRATIC_INPUTS
        self.register_buffer("pairs", torch.triu_indices(width, width))
        self.typical = max(1.0, float(tasks.sizes.mean()))
        sums = self._features + (self.pairs.shape[1] if self._quadratic else width)
        self.row_net = MLP([width, self._hidden, self._hidden, self._features + self._directions + 1])
        self.theta = ThetaStandardiser(theta_dim)
        self.weights = Loadings(theta_dim, dim, sums, hidden=self._hidden, initial_sd=0.1 / math.sqrt(sums))
        self.rank_one = Loadings(theta_dim, dim, self._directions, hidden=self._hidden, initial_sd=0.3)
        self.linear = Loadings(theta_dim, dim, width, hidden=self._hidden, initial_sd=0.3)
        residual = [sums + self._directions + 1 + self.inputs.task_width + theta_dim, self._hidden]
        self.residual = MLP([*residual, dim + dim * (dim + 1) // 2], zero=True)
        self._dim, self._dtype = dim, density.dtype
        position = torch.tril_indices(dim, dim)
        place = torch.zeros(position.shape[1], dim * dim, dtype=density.dtype)
        place[torch.arange(position.shape[1]), position[0] * dim + position[1]] = 1.0
        self.register_buffer("place", place)

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Standardises θ with q(θ)'s location and scale from now on."""
        self.theta.follow(loc, scale)

    def prepare(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """Encodes the rows and sums them within tasks."""
        rows = self.inputs(batch)
        per_task = rows.task_inputs[rows.segment]
        inputs = torch.cat([torch.ones(len(rows.inputs), 1), rows.inputs, per_task], -1)
        learned = self.row_net(inputs)
        features, gates = learned.split([self._features, self._directions + 1], -1)
        gates = nn.functional.softplus(gates)
        scaled = inputs * gates[:, -1:].sqrt()
        summary = {
            "sums": self._sums(rows, features, inputs),
            "gates": rows.total(gates[:, :-1]) / self.typical,
            "outer": rows.total(scaled.unsqueeze(-1) * scaled.unsqueeze(-2)) / self.typical,
            "count": rows.count,
            "task": rows.task_inputs,
        }
        return Context(batch, data, summary)

    def _sums(self, rows: Rows, features: Tensor, inputs: Tensor) -> Tensor:
        fixed = inputs[:, self.pairs[0]] * inputs[:, self.pairs[1]] if self._quadratic else inputs
        return rows.total(torch.cat([features, fixed], -1)) / self.typical

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:
        """q(φ | D, θ) of every task for every θ."""
        theta = self.theta(theta)
        sums, gates, outer = context.summary["sums"], context.summary["gates"], context.summary["outer"]
        eta = torch.einsum("sdk,tk->std", self.weights(theta), sums)
        directions, linear = self.rank_one(theta), self.linear(theta)
        precision = torch.einsum("sdm,tm,sem->stde", directions, gates, directions)
        precision = precision + torch.einsum("sdk,tkl,sel->stde", linear, outer, linear)
        precision = precision.to(self._dtype) + torch.eye(self._dim, dtype=self._dtype)
        factor = cholesky(precision)
        shift, bend = self._residual(theta, context)
        half = solve_lower(factor, eta.to(self._dtype))
        loc = solve_upper(factor.mT, half) + shift
        return GaussianTasks(loc, factor @ bend)

    def _residual(self, theta: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """A shift of the mean `(S, T, d)` and a lower-triangular factor `(S, T, d, d)` near the identity."""
        summary = context.summary
        count = summary["count"].unsqueeze(-1)
        mean = torch.cat([summary["sums"], summary["gates"]], -1) * (self.typical / count.clamp(min=1))
        per_task = torch.cat([mean, count.log1p(), summary["task"]], -1)
        first, *rest = self.residual
        hidden = per_task @ first.weight[:, : per_task.shape[1]].mT + first.bias
        hidden = hidden.unsqueeze(0) + (theta @ first.weight[:, per_task.shape[1] :].mT).unsqueeze(1)
        for layer in rest:
            hidden = layer(hidden)
        out = (hidden * (count / (count + 1))).to(self._dtype)
        shift, lower = out.split([self._dim, out.shape[-1] - self._dim], -1)
        matrix = (lower @ self.place).reshape(*lower.shape[:-1], self._dim, self._dim)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).clamp(-MAX_BEND, MAX_BEND).exp()
        return shift, matrix.tril(-1) + torch.diag_embed(diagonal)
