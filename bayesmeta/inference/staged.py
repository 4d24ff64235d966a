"""The default guide of models whose task sites hang together: one site after the other, each given those before.

q(φ | D, θ) = Π_k q(φ_k | φ_1 … φ_{k-1}, D, θ). Every factor is Gaussian as in `guides.py`, with natural parameters that
rows add up to; earlier sites enter as θ does, after pooling. Groups within a task given its scales, or a mean given its
noise, are then Gaussian as they should be, where one Gaussian of all sites has to bend around a funnel. The first
factor, mostly of scales, may be skewed.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.networks import MLP, RowInputs
from bayesmeta.inference.gaussian import (
    COLUMNWISE,
    Lower,
    NaturalTasks,
    Pushed,
    SkewedTasks,
    heavy_scale,
    normal_log_prob,
    student_t_log_prob,
)
from bayesmeta.inference.loadings import ThetaStandardiser
from bayesmeta.inference.protocols import Context, TaskGuide

RIDGE = 1e-9
"""Added to second moments of standardised rows, and so much of them: a smaller share is not told from nothing."""
ROUNDING = 1e-6
"""Of a precision in float32, relative to its trace: so much more on the diagonal keeps it positive definite."""
MAX_BEND, MAX_SCALE = 8.0, 8.0
"""Bounds on the logs of what bends a precision, and of what scales the rows' terms."""
MAX_SKEW = 1.0
"""Bound on the log of how much wider the tails of a skewed posterior are on one side, and narrower on the other."""
NOISE_BOUND = 5.0
"""Noise of earlier sites is bent towards ± this, as θ is."""


class Stage(nn.Module):
    """q(φ_k | φ_1 … φ_{k-1}, D, θ): natural parameters of the rows in units that the earlier sites set, and a residual.

    Args:
        dim: Coordinates of the stage.
        known: Coordinates of θ and of the earlier stages.
        sums: Numbers that rows add up to.
        moments: Width of a row in the second moments.
        gates: Further rank-one terms of the precision.
        summary: Width of a task's summary.
        hidden: Width of the networks.
        skewed: Whether its posteriors may be skewed.
    """

    def __init__(
        self,
        *,
        dim: int,
        known: int,
        sums: int,
        moments: int,
        gates: int,
        summary: int,
        hidden: int,
        skewed: bool,
    ) -> None:
        super().__init__()
        self._dim, self._widths, self._skewed = dim, [moments, gates], skewed
        self.trunk = MLP([known, hidden, hidden, hidden]) if known else None
        first = 1 / math.sqrt(hidden)
        self.weights = nn.Parameter(0.1 * first / math.sqrt(sums) * torch.randn(hidden + 1, dim, sums))
        self.columns = nn.Parameter(0.1 * first * torch.randn(hidden + 1, dim, moments + gates))
        self.scales = nn.Linear(hidden, 2 * dim)
        self.task = nn.Linear(summary, hidden)
        self.known = nn.Linear(hidden, hidden, bias=False)
        self._rest = [dim, dim * (dim + 1) // 2, dim * skewed]
        self.rest = MLP([hidden, hidden, sum(self._rest)], zero=True)
        nn.init.zeros_(self.scales.weight)
        nn.init.zeros_(self.scales.bias)
        self._hidden = hidden

    def forward(self, known: Tensor, summary: Mapping[str, Tensor], dtype: torch.dtype) -> NaturalTasks | SkewedTasks:
        """`known (S, T or 1, k)` float32 -> Gaussians, bent where posteriors may be skewed, of S × T tasks."""
        count = summary["count"]
        shape = (len(known), len(count))
        hidden = known.new_zeros(*shape, self._hidden)
        if self.trunk is not None:
            hidden = nn.functional.silu(self.trunk(known)).expand(*shape, -1)
        features = torch.cat([torch.ones_like(hidden[..., :1]), hidden], -1)
        by_sum = torch.einsum("hrc,tc->thr", self.weights, summary["sums"])
        eta = torch.einsum("sth,thr->str", features, by_sum).movedim(-1, 0)
        loud, far = self.scales(hidden).clamp(-MAX_SCALE, MAX_SCALE).exp().movedim(-1, 0).chunk(2)
        lower = Lower.cholesky(self._precision(features, loud, summary, dtype))
        half = lower.solve((eta * loud * far).to(dtype))
        mixed = nn.functional.silu(self.task(summary["task"]) + self.known(hidden))
        rest = self.rest(mixed) * (count / (count + 1)).unsqueeze(-1)
        shift, bend, skew = rest.to(dtype).movedim(-1, 0).split(self._rest)
        gaussian = NaturalTasks(half, shift, lower, Lower.identity_at_zero(bend, bound=MAX_BEND))
        return SkewedTasks(gaussian, MAX_SKEW * torch.tanh(skew / MAX_SKEW)) if self._skewed else gaussian

    def _precision(self, features: Tensor, loud: Tensor, summary: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """I + Σ_j of the rows' terms, `(d, d, S, T)`."""
        flat = self.columns.flatten(1).mT @ features.flatten(0, 1).mT
        columns = flat.unflatten(-1, features.shape[:2]).unflatten(0, (self._dim, sum(self._widths)))
        moments, gates = columns.split(self._widths, 1)
        moments = (moments.unsqueeze(2) * summary["root"].unsqueeze(2)).sum(1)
        root = torch.cat([moments, gates * summary["gates"].sqrt().unsqueeze(1)], 1) * loud.unsqueeze(1)
        precision = _outer(root).to(dtype)
        least = 1 + ROUNDING * precision.diagonal().sum(-1)
        return precision + torch.eye(self._dim, dtype=dtype)[..., None, None] * least


def _outer(root: Tensor) -> Tensor:
    """R Rᵀ of matrices `(d, k, S, T)`: `(d, d, S, T)`; small ones by sums over all matrices at once."""
    if len(root) <= COLUMNWISE:
        return (root.unsqueeze(1) * root).sum(2)
    rows = root.movedim((0, 1), (-2, -1)).contiguous()
    return (rows @ rows.mT).movedim((-2, -1), (0, 1))


@dataclass
class StagedTasks(Pushed):
    """Task posteriors of S θ and T tasks, stage after stage.

    Attributes:
        guide: The guide, evaluated with `parameters` whatever the module holds by then.
        parameters: The guide's parameters at the time of conditioning.
        theta: Standardised `(S, d_theta)`.
        summary: What the guide made of the tasks.
    """

    guide: StagedGuide
    parameters: Mapping[str, Tensor]
    theta: Tensor
    summary: Mapping[str, Tensor]

    @property
    def example(self) -> Tensor:
        """Of a draw's shape."""
        shape = (len(self.theta), len(self.summary["count"]), len(self.guide.order))
        return self.theta.new_zeros(()).to(self.guide.dtype).expand(shape)

    def push(self, white: Tensor) -> Tensor:
        """Draws of each stage given those before it."""
        found: list[Tensor] = []
        for stage, part in enumerate(white.split(self.guide.sizes, -1)):
            found.append(self._stage(stage, found).push(part))
        return torch.cat(found, -1)[..., self.guide.order.argsort()]

    def pull(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the stages."""
        squares, log_dets = zip(*self._pulled(noise), strict=True)
        return functools.reduce(operator.add, squares), functools.reduce(operator.add, log_dets)

    def heavier(self, white: Tensor) -> Tensor:
        """Each stage's noise is t(5) by itself: a scale far out goes with groups that are not."""
        parts = white.split(self.guide.sizes, -1)
        return torch.cat([part * heavy_scale((*part.shape[:-1], 1), part) for part in parts], -1)

    def log_probs(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Normal and t(5) log densities `(S, T)` at once, the latter stage by stage."""
        found = [(*pulled, size) for pulled, size in zip(self._pulled(noise), self.guide.sizes, strict=True)]
        light, heavy = ([density(*one) for one in found] for density in (normal_log_prob, student_t_log_prob))
        return functools.reduce(operator.add, light), functools.reduce(operator.add, heavy)

    def _pulled(self, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = noise[..., self.guide.order].split(self.guide.sizes, -1)
        return [self._stage(stage, parts[:stage]).pull(part) for stage, part in enumerate(parts)]

    def _stage(self, stage: int, before: Sequence[Tensor]) -> Pushed:
        known = self.theta.unsqueeze(1)
        if not before and not known.shape[-1]:
            known = known[:1]  # the same for every draw
        if before:
            noise = NOISE_BOUND * torch.tanh(torch.cat(list(before), -1) / NOISE_BOUND)
            known = torch.cat([known.expand(*noise.shape[:2], -1), noise.float()], -1)
        prefix = f"stages.{stage}."
        own = {name.removeprefix(prefix): p for name, p in self.parameters.items() if name.startswith(prefix)}
        return functional_call(self.guide.stages[stage], own, (known, self.summary, self.guide.dtype))


class StagedGuide(TaskGuide):
    """The default guide where task sites hang together.

    Args:
        stages: Coordinates of the noise by stage, as `TaskDensity.stages`.
        features: Learned features a row.
        gates: Learned rank-one precision terms.
        hidden: Width of the networks.
        embed: Module `(R, *dx) -> (R, k)` for images and the like.
    """

    order: Tensor
    cost = 12.0

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        features: int = 24,
        gates: int = 6,
        hidden: int = 64,
        embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.sizes = [len(stage) for stage in stages]
        self.register_buffer("order", torch.tensor([i for stage in stages for i in stage]), persistent=False)
        self._features, self._gates, self._hidden, self._embed = features, gates, hidden, embed

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the networks for the model's dimensions and the tasks' columns."""
        self.dtype, theta_dim = density.dtype, density.structure.shared_size
        self.inputs = RowInputs(tasks, embed=self._embed, indices=density.index_columns)
        labels = range(self.inputs.labels.start, self.inputs.labels.stop)
        width = 1 + self.inputs.width + self.inputs.task_width
        others = [i for i in range(width - 1) if i not in labels]
        self._arrange = [0, *(1 + i for i in others), *(1 + i for i in labels)]
        self._labels = len(labels)
        self.typical = max(1.0, float(tasks.sizes.mean()))
        self.row_net = MLP([width, self._hidden, self._features + self._gates])
        self.theta = ThetaStandardiser(theta_dim)
        pairs = self._labels * width
        sums = self._features + width + pairs
        left = width - self._labels + 1
        summary = self._features + self._gates + self._labels * (width + left) + 1 + self.inputs.task_width
        widths = {"sums": sums, "moments": width, "gates": self._gates, "summary": summary, "hidden": self._hidden}
        known = [theta_dim + sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self.stages = nn.ModuleList(
            Stage(dim=d, known=k, skewed=not place, **widths)
            for place, (d, k) in enumerate(zip(self.sizes, known, strict=True))
        )

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Standardises θ with q(θ)'s location and scale from now on."""
        self.theta.follow(loc, scale)

    def prepare(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """Encodes the rows, sums them within tasks, and regresses the labels on everything else."""
        rows = self.inputs(batch)
        inputs = rows.whole()
        features, gates = self.row_net(inputs).split([self._features, self._gates], -1)
        gates = nn.functional.softplus(gates)
        inputs = inputs[:, self._arrange]
        products = inputs[:, -self._labels :].unsqueeze(-1) * inputs.unsqueeze(-2)
        sums = rows.total(torch.cat([features, inputs, products.flatten(1), gates], -1))
        count = rows.count.unsqueeze(-1)
        mean = sums / count.clamp(min=1)
        exact = inputs.double()
        second = rows.total(exact.unsqueeze(-1) * exact.unsqueeze(-2)) / count.clamp(min=1).unsqueeze(-1)
        root = torch.linalg.cholesky(second + RIDGE * torch.diag_embed(1 + second.diagonal(dim1=-2, dim2=-1)))
        learned = torch.cat([mean[:, : self._features], mean[:, -self._gates :]], -1)
        known = [learned, _regression(root, self._labels).float(), count.log1p(), rows.task_inputs]
        sums, gates = (sums / self.typical).split([sums.shape[1] - self._gates, self._gates], -1)
        root = (root.float() * (count / self.typical).sqrt().unsqueeze(-1)).movedim(0, -1)
        summary = {"sums": sums, "gates": gates.mT, "root": root, "count": rows.count, "task": torch.cat(known, -1)}
        return Context(batch, data, summary)

    def condition(self, theta: Tensor, context: Context) -> StagedTasks:
        """q(φ | D, θ) of every task for every θ."""
        return StagedTasks(self, dict(self.named_parameters()), self.theta(theta), context.summary)


def _regression(root: Tensor, labels: int) -> Tensor:
    """Coefficients of the labels on all before them, in units of its spread, and logs of what is left of the labels.

    What is left after each column, not after all of them only: where groups hardly differ, how much they do is a
    difference of these logs and nothing that a network could read off the coefficients.
    """
    rows = root[:, -labels:]
    count = root.shape[-1] - labels
    coefficients = rows.clone()
    coefficients[:, torch.arange(labels), torch.arange(count, count + labels)] = 0.0
    left = rows.square().flip(-1).cumsum(-1).flip(-1).log() / 2
    return torch.cat([coefficients.flatten(1), left[..., : count + 1].flatten(1)], -1)
