"""Normalizing flows for task posteriors that are bent or have several modes; needs zuko (`bayesmeta[flows]`).

A Gaussian guide gives location and scale, monotone splines bend its noise: φ = m + L⁻ᵀ f(ε; task, θ). f starts at the
identity and is the identity for a task without rows. The only file that knows zuko. Called by `amortized.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, transforms
from torch.func import functional_call

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.networks import MLP
from bayesmeta.inference.gaussian import (
    GaussianTasks,
    Pushed,
)
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.pooled import PooledGuide
from bayesmeta.inference.protocols import Context, TaskGuide

SUMMARY = 16
"""Numbers that the splines are told about a task, besides θ and its Gaussian."""
EMPTIED = ("_validate_args", "arg_constraints")
"""What zuko replaces on torch's `Distribution` when it is imported."""


def import_zuko() -> Any:
    """Imports zuko and undoes what that changes in torch; zuko's own distributions keep the settings they rely on.

    Raises:
        ValueError: zuko is not installed.
    """
    before = {name: Distribution.__dict__[name] for name in EMPTIED}
    inverse_name = transforms._InverseTransform.__name__
    try:
        import zuko
    except ImportError as error:
        raise ValueError(
            'family="flow" needs the package zuko, which is not installed: pip install bayesmeta[flows]'
        ) from error
    changed = {name: old for name, old in before.items() if Distribution.__dict__[name] is not old}
    for name, old in changed.items():
        for cls in _own_distributions():
            if name not in cls.__dict__:
                setattr(cls, name, Distribution.__dict__[name])
        setattr(Distribution, name, old)
    transforms._InverseTransform.__name__ = inverse_name
    return zuko


def _own_distributions() -> list[type[Distribution]]:
    return [cls for cls in Distribution.__subclasses__() if cls.__module__.startswith("zuko.")]


class SplineLayer(nn.Module):
    """Each coordinate through a rational-quadratic spline given the coordinates before it and a context.

    References:
        Durkan et al.: Neural Spline Flows, 2019, https://arxiv.org/abs/1906.04032

    Args:
        order: The coordinates' order `(d,)`.
        context: Width of the context.
        bins: Bins of a spline on [-5, 5]; beyond it is the identity.
        hidden: Width of the network.
    """

    def __init__(self, order: Tensor, context: int, *, bins: int, hidden: int) -> None:
        super().__init__()
        self._parts = (bins, bins, bins - 1)
        self._order = order.argsort().tolist()
        sees = torch.cat([order[:, None] > order, torch.ones(len(order), context, dtype=torch.bool)], 1)
        sees = sees.repeat_interleave(sum(self._parts), 0)
        *body, last = import_zuko().nn.MaskedMLP(sees, [hidden, hidden], activation=nn.SiLU)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.body, self.last = nn.Sequential(*body), last

    def forward(self, x: Tensor, context: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Maps `x (S, T, d)` for a context `(S, T, k)`; the identity where `gain (T, 1)` is 0. Also `log |det|`."""
        raw = self.last(self.body(torch.cat([x, context], -1))).unflatten(-1, (x.shape[-1], -1))
        bent, log_det = self._splines(raw * gain.unsqueeze(-1)).call_and_ladj(x)
        return bent, log_det.sum(-1)

    def backward(self, y: Tensor, context: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, one coordinate after the other, and the log determinant of the *forward* map."""
        columns = list(torch.zeros_like(y).unbind(-1))
        total = y.new_zeros(y.shape[:-1])
        weight = (self.last.mask * self.last.weight).unflatten(0, (y.shape[-1], -1))
        bias = self.last.bias.unflatten(0, (y.shape[-1], -1))
        for i in self._order:
            hidden = self.body(torch.cat([torch.stack(columns, -1), context], -1))
            spline = self._splines(nn.functional.linear(hidden, weight[i], bias[i]) * gain)
            columns[i] = spline.inv(y[..., i])
            total = total + spline.call_and_ladj(columns[i])[1]
        return torch.stack(columns, -1), total

    def _splines(self, raw: Tensor) -> Any:
        return import_zuko().transforms.MonotonicRQSTransform(*raw.split(self._parts, -1))


class Bend(nn.Module):
    """The map f of noise, a stack of spline layers with alternating order."""

    def __init__(self, dim: int, context: int, *, layers: int, bins: int, hidden: int) -> None:
        super().__init__()
        forwards = torch.arange(dim)
        orders = [forwards if i % 2 == 0 else forwards.flip(0) for i in range(layers)]
        self.layers = nn.ModuleList(SplineLayer(order, context, bins=bins, hidden=hidden) for order in orders)

    def forward(self, x: Tensor, context: Tensor, gain: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Maps noise `(S, T, d)`, or back; the second value is the log determinant of the forward map `(S, T)`."""
        layers = [layer for layer in self.layers if isinstance(layer, SplineLayer)]
        total = x.new_zeros(x.shape[:-1])
        for layer in reversed(layers) if inverse else layers:
            x, log_det = (layer.backward if inverse else layer)(x, context, gain)
            total = total + log_det
        return x, total


@dataclass
class FlowTasks(Pushed):
    """Task posteriors of S θ and T tasks: a Gaussian's standardised noise, bent.

    Attributes:
        base: The Gaussian.
        bend: The map, evaluated with `parameters` whatever the module holds by then.
        parameters: The map's parameters at the time of conditioning.
        context: `(S, T, k)`.
        gain: `(T, 1)`.
    """

    base: GaussianTasks
    bend: Bend
    parameters: Mapping[str, Tensor]
    context: Tensor
    gain: Tensor

    @property
    def example(self) -> Tensor:
        """The Gaussian's means."""
        return self.base.example

    def push(self, white: Tensor) -> Tensor:
        """The Gaussian's draw of bent noise."""
        bent, _ = self._bend(white, inverse=False)
        return self.base.push(bent)

    def pull(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Unbent standard noise, squared, and the log determinant of both inverse maps."""
        white, log_det = self._bend(self.base.whiten(noise), inverse=True)
        return white.square().sum(-1), self.base.log_det() - log_det

    def _bend(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        context = self.context.expand(*x.shape[:-1], -1)
        return functional_call(self.bend, dict(self.parameters), (x, context, self.gain, inverse))


class FlowGuide(TaskGuide):
    """q(φ | D, θ) as a conditional neural spline flow on top of a Gaussian guide.

    Evaluating the density at given φ costs one pass of the network for each task dimension and layer.

    Args:
        base: The Gaussian guide, natural (the default) or pooled.
        layers: Spline layers.
        bins: Bins of a spline.
        hidden: Width of the networks.

    Raises:
        ValueError: zuko is not installed, or the base is another guide.
    """

    cost = 16.0

    def __init__(
        self,
        base: NaturalGuide | PooledGuide | None = None,
        *,
        layers: int = 3,
        bins: int = 8,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        import_zuko()
        base = NaturalGuide() if base is None else base
        if not isinstance(base, (NaturalGuide, PooledGuide)):
            raise ValueError(f"FlowGuide bends a NaturalGuide or a PooledGuide, got {type(base).__name__}")
        self.base = base
        self._sizes = {"layers": layers, "bins": bins, "hidden": hidden}

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Builds the Gaussian guide and the splines."""
        self.base.attach(density, tasks)
        self._dtype = density.dtype
        dim = density.structure.task_size
        probe = tasks.batch([0])
        with torch.no_grad():
            width = self._features(self.base.prepare(probe, density.tensors(probe))).shape[1]
        self.reduce = MLP([width, self._sizes["hidden"], SUMMARY])
        context = SUMMARY + density.structure.shared_size + 2 * dim
        self.bend = Bend(dim, context, **self._sizes).to(density.dtype)

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Standardises θ with q(θ)'s location and scale from now on."""
        self.base.follow(loc, scale)

    def prepare(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """Encodes the rows as the Gaussian guide does, and reduces its summary."""
        context = self.base.prepare(batch, data)
        return Context(batch, data, {**context.summary, "reduced": self.reduce(self._features(context))})

    def condition(self, theta: Tensor, context: Context) -> FlowTasks:
        """q(φ | D, θ) of every task for every θ."""
        found = self.base.condition(theta, context)
        base = GaussianTasks(found.loc, found.factor)
        draws, tasks = base.loc.shape[:2]
        count = context.summary["count"].unsqueeze(-1).to(self._dtype)
        known = [
            context.summary["reduced"].to(self._dtype).expand(draws, -1, -1),
            self.base.theta(theta).to(self._dtype).unsqueeze(1).expand(-1, tasks, -1),
            base.loc,
            base.factor.diagonal(dim1=-2, dim2=-1).log(),
        ]
        parameters = dict(self.bend.named_parameters())
        return FlowTasks(base, self.bend, parameters, torch.cat(known, -1), count / (count + 1))

    def _features(self, context: Context) -> Tensor:
        """What the Gaussian guide knows about a task, θ apart: `(T, k)`."""
        summary = context.summary
        if isinstance(self.base, PooledGuide):
            return summary["task"]
        count = summary["count"].unsqueeze(-1)
        mean = torch.cat([summary["sums"], summary["gates"]], -1) * (self.base.typical / count.clamp(min=1))
        return torch.cat([mean, count.log1p(), summary["task"]], -1)
