"""Guides that pool the rows of a task into a summary: deep sets, set attention, or the user's own module.

The posterior of a task is a Gaussian in whitened coordinates whose mean and precision are read off the pooled rows and
θ, which enters after pooling; unlike the default guide (`guides.py`) nothing is additive over rows, so that likelihoods
of any shape can be summarised. Called by `amortized.py`; `flows.py` bends what is Gaussian here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.networks import MLP, RowInputs, Rows
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.loadings import ThetaStandardiser
from bayesmeta.inference.protocols import Context, TaskGuide

HEADS = 4
QUERIES = 4
PROBE_TASKS = 2
MAX_LOG_SCALE = 12.0
"""Bound on the log of the precision factor's diagonal."""


class DeepSet(nn.Module):
    """Mean over rows of a perceptron's features.

    References:
        Zaheer et al.: Deep Sets, 2017, https://arxiv.org/abs/1703.06114
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = MLP([width, hidden, hidden, hidden])

    def forward(self, rows: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Rows `(T, N, width)`, mask and weights `(T, N)` -> `(T, hidden)`."""
        share = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        return torch.einsum("tn,tnk->tk", share, self.net(rows))


class Attention(nn.Module):
    """Multi-head attention with a bias on the keys: `(T, Q, k), (T, N, k), (T, N)` -> `(T, Q, k)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
        """Attends; `bias` is the log weight of each row, -inf for padding."""
        parts = [self.query(queries), *self.key_value(rows).chunk(2, -1)]
        query, key, value = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None, None])
        return self.out(found.transpose(1, 2).flatten(2))


class SetAttention(nn.Module):
    """Rows attend to each other once, then a few learned queries read them. Costs rows² a task.

    Weights of rows are log weights in the softmax: a row of weight 2 counts as two.

    References:
        Lee et al.: Set Transformer, 2019, https://arxiv.org/abs/1810.00825
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = -(-hidden // HEADS) * HEADS
        self.embed = MLP([width, hidden, hidden])
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.among = Attention(hidden)
        self.mix = MLP([hidden, hidden, hidden])
        self.queries = nn.Parameter(torch.randn(QUERIES, hidden))
        self.read = Attention(hidden)
        self.out = nn.Linear(QUERIES * hidden, hidden)

    def forward(self, rows: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Rows `(T, N, width)`, mask and weights `(T, N)` -> `(T, hidden)`."""
        empty = ~(weight > 0).any(1, keepdim=True)
        bias = torch.where(empty, torch.zeros_like(weight), weight.log())
        features = self.embed(rows)
        normed = self.norms[0](features)
        features = features + self.among(normed, normed, bias)
        features = self.norms[2](features + self.mix(self.norms[1](features)))
        read = self.read(self.queries.expand(len(rows), -1, -1), features, bias)
        return self.out(read.flatten(1))


class UserEncoder(nn.Module):
    """The user's module, which knows no weights: where there are any they are its last input."""

    def __init__(self, module: nn.Module, *, weighted: bool) -> None:
        super().__init__()
        self.module, self._weighted = module, weighted

    def forward(self, rows: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Rows `(T, N, width)`, mask and weights `(T, N)` -> `(T, k)`."""
        inputs = torch.cat([rows, weight.unsqueeze(-1)], -1) if self._weighted else rows
        pooled = self.module(inputs, mask)
        if not isinstance(pooled, Tensor) or pooled.dim() != 2 or len(pooled) != len(rows):
            got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(
                f"the encoder module must map rows {tuple(inputs.shape)} and a mask {tuple(mask.shape)} to one vector "
                f"a task, shape ({len(rows)}, k); got {got}. Pool over the rows, e.g. a masked mean over dimension 1"
            )
        return pooled.float()


ENCODERS = {"deepset": DeepSet, "attention": SetAttention}


class ThetaHead(nn.Module):
    """A perceptron of a task's summary and θ that starts at zero; it never builds the pairs of its inputs."""

    def __init__(self, task_width: int, theta_width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.task = nn.Linear(task_width, hidden)
        self.theta = nn.Linear(theta_width, hidden, bias=False) if theta_width else None
        self.rest = MLP([hidden, hidden, out], zero=True)

    def forward(self, theta: Tensor, task: Tensor) -> Tensor:
        """`(S, theta_width)` and `(T, task_width)` -> `(S, T, out)`."""
        hidden = self.task(task).expand(len(theta), -1, -1)
        if self.theta is not None:
            hidden = hidden + self.theta(theta).unsqueeze(1)
        return self.rest(nn.functional.silu(hidden))


class PooledGuide(TaskGuide):
    """q(φ | D, θ) = N(m, (L Lᵀ)⁻¹) with m and L from pooled rows and θ; without rows it is exactly the prior.

    Args:
        encoder: "deepset", "attention", or a module `(rows (T, N, width), mask (T, N) bool) -> (T, k)`; padded rows are
            zero. The module is copied, and its rows are standardised x, y, columns and task columns (and the weight,
            where tasks have weights).
        hidden: Width of the networks.
        embed: Module `(R, *dx) -> (R, k)` for images and the like.

    Raises:
        ValueError: The encoder is unknown or, at `attach`, returns a wrong shape.
    """

    def __init__(
        self, *, encoder: str | nn.Module = "deepset", hidden: int = 32, embed: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module) and encoder not in ENCODERS:
            raise ValueError(f"PooledGuide: encoder must be one of {sorted(ENCODERS)} or a module, got {encoder!r}")
        self._given: tuple[str | nn.Module, nn.Module | None] = (encoder, embed)
        self._hidden = hidden

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the networks for the model's dimensions and the tasks' columns."""
        encoder, embed = copy.deepcopy(self._given)
        self._dim, self._dtype = density.structure.task_size, density.dtype
        theta_dim = density.structure.shared_size
        self.inputs = RowInputs(tasks, embed=embed, indices=density.index_columns)
        width = self.inputs.width + self.inputs.task_width
        if isinstance(encoder, nn.Module):
            weighted = tasks.weight is not None or tasks.task_weight is not None
            self.encoder: nn.Module = UserEncoder(encoder, weighted=weighted)
        else:
            self.encoder = ENCODERS[encoder](width, self._hidden)
        self.theta = ThetaStandardiser(theta_dim)
        with torch.no_grad():
            probe = self._summary(tasks.batch(range(min(PROBE_TASKS, len(tasks)))))
        outputs = self._dim + self._dim * (self._dim + 1) // 2
        self.head = ThetaHead(probe["task"].shape[1], theta_dim, self._hidden, outputs)

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Standardises θ with q(θ)'s location and scale from now on."""
        self.theta.follow(loc, scale)

    def prepare(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """Encodes and pools the rows."""
        return Context(batch, data, self._summary(batch))

    def condition(self, theta: Tensor, context: Context) -> GaussianTasks:
        """q(φ | D, θ) of every task for every θ."""
        out = self.head(self.theta(theta), context.summary["task"])
        count = context.summary["count"].unsqueeze(-1)
        out = (out * (count / (count + 1))).to(self._dtype)
        loc, lower = out.split([self._dim, out.shape[-1] - self._dim], -1)
        return GaussianTasks(loc, precision_factor(lower, self._dim))

    def _summary(self, batch: Batch) -> dict[str, Tensor]:
        """`count (T,)`, the weight of a task's rows, and `task (T, k)`, all that is known about a task."""
        rows = self.inputs(batch)
        padded, mask, weight = pad(rows)
        pooled = self.encoder(padded, mask, weight)
        count = weight.sum(1)
        return {"count": count, "task": torch.cat([pooled, count.log1p().unsqueeze(-1), rows.task_inputs], -1)}


def pad(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with the inputs of their task, padded with zeros: `(T, N, width)`, mask `(T, N)`, weights `(T, N)`."""
    inputs = torch.cat([rows.inputs, rows.task_inputs[rows.segment]], -1)
    sizes = rows.count.long()
    first = sizes.cumsum(0) - sizes
    place = (rows.segment, torch.arange(len(inputs)) - first[rows.segment])
    shape = (len(sizes), max(1, int(sizes.max())))
    padded = inputs.new_zeros(*shape, inputs.shape[1]).index_put(place, inputs)
    given = inputs.new_ones(len(inputs)) if rows.weight is None else rows.weight
    weight = given.new_zeros(shape).index_put(place, given)
    return padded, torch.arange(shape[1]) < sizes.unsqueeze(1), weight


def precision_factor(values: Tensor, dim: int) -> Tensor:
    """A lower-triangular factor `(..., d, d)`, the identity at zero, from `(..., d (d + 1) / 2)` numbers."""
    row, column = torch.tril_indices(dim, dim)
    place = nn.functional.one_hot(row * dim + column, dim * dim).to(values.dtype)
    matrix = (values @ place).unflatten(-1, (dim, dim))
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    return matrix.tril(-1) + torch.diag_embed(diagonal)
