"""Units and noise of several outputs: labels on one scale inside the function, a noise of each task's own.

Wherever φ acts, it acts on standardised features and labels, so that one prior suits all outputs; predictions are in
the user's units. With a noise of its own for each task no label scale is needed, as in uncertainty weighting of losses:
it is the Gaussian likelihood with learned noise.

References:
    Kendall, Gal, Cipolla: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics, 2018,
    https://arxiv.org/abs/1705.07115
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models.conditioning.base import Conditioned
from bayesmeta.models.sharing import Block, Blocks

SCALED = (bm.likelihoods.Normal, bm.likelihoods.StudentT, bm.likelihoods.LocationScale)
"""Likelihoods with a location and a scale in the units of their labels."""


class OwnNoise(Conditioned):
    """A function with a log noise sd of each task behind some of its numbers, a block of φ: `log_noise`.

    Its scale is learned whatever the tasks share otherwise: with hard sharing noises would be one.
    """

    def __init__(self, function: Conditioned, places: tuple[int, ...]) -> None:
        """Puts a log noise behind each of the places among the function's numbers."""
        super().__init__()
        self.function, self.places = function, places
        self.blocks = Blocks((*function.blocks.all, Block("log_noise", (len(places),), free=True)))

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        """Numbers and log noises side by side."""
        f = self.function.evaluate(parts, x)
        noise = parts["log_noise"].expand(*f.shape[:2], -1)
        columns = [f[..., i] for i in range(f.shape[-1])]
        for count, place in enumerate(self.places):
            columns.insert(place + 1 + count, noise[..., count])
        return torch.stack(columns, -1)


class Standardized(Conditioned):
    """A function of standardised inputs, its numbers put into the units of the labels."""

    def __init__(self, function: Conditioned, x: tuple[Tensor, Tensor], f: tuple[Tensor, Tensor]) -> None:
        """Takes locations and scales of inputs `(*dx)` and of the function's numbers `(K,)`."""
        super().__init__()
        self.function, self.blocks = function, function.blocks
        for name, value in (("x_loc", x[0]), ("x_scale", x[1]), ("f_loc", f[0]), ("f_scale", f[1])):
            self.register_buffer(name, value)

    x_loc: Tensor
    x_scale: Tensor
    f_loc: Tensor
    f_scale: Tensor

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        """Standardises, evaluates and scales back."""
        return self.f_loc + self.f_scale * self.function.evaluate(parts, (x - self.x_loc) / self.x_scale)


def width(likelihood: Any) -> int:
    """Numbers of f that a row takes; 1 for a function."""
    return getattr(likelihood, "width", 1) or 1


def own_noise(likelihood: Any) -> tuple[Any, tuple[int, ...]]:
    """A likelihood whose Normal parts read their noise from the function, and at which of its numbers these stand.

    Raises:
        ValueError: If no part is a Normal that learns its noise.
    """
    parts = likelihood.by_output if isinstance(likelihood, bm.likelihoods.Outputs) else {"y": likelihood}
    learns = [_learns_noise(part) for part in parts.values()]
    if not any(learns):
        raise ValueError(f'noise="task": expected bm.likelihoods.Normal(), which learns its noise, got {likelihood!r}')
    ends = accumulate((width(part) for part in parts.values()), initial=0)
    places = tuple(start for start, own in zip(ends, learns, strict=False) if own)
    pairs = zip(parts.items(), learns, strict=True)
    changed = {key: bm.likelihoods.LocationScale() if own else part for (key, part), own in pairs}
    whole = isinstance(likelihood, bm.likelihoods.Outputs)
    return (bm.likelihoods.Outputs(changed) if whole else changed["y"]), places


def _learns_noise(part: Any) -> bool:
    return isinstance(part, bm.likelihoods.Normal) and part.scale is None


def standardized(function: nn.Module, likelihood: Any, tasks: bm.Tasks) -> tuple[Conditioned, Any]:
    """The function in standard units, and the likelihood with its priors of scales in those of the labels.

    Args:
        function: A `Conditioned`.
        likelihood: Its likelihood, or `Outputs`.
        tasks: Whose inputs (text stays codes) and labels give the units.

    Raises:
        ValueError: If an output has no labels, or there is a likelihood for each kind of rows.
    """
    if isinstance(likelihood, bm.likelihoods.Kinds):
        raise ValueError("standardize: expected one likelihood or Outputs, got Kinds, whose kinds share one scale of f")
    several = isinstance(likelihood, bm.likelihoods.Outputs)
    parts = likelihood.by_output if several else {0: likelihood}
    columns: list[tuple[float, float]] = []
    changed = {}
    for key, part in parts.items():
        one = tasks.only(key)
        y = one.y[one.observed].double()
        if not len(y):
            raise ValueError(f"standardize: expected labels of output {key!r}, got none that is observed")
        loc, scale = float(y.mean()), float(y.std(correction=0)) or 1.0
        columns += _columns(part, loc, scale)
        changed[key] = _scaled(part, scale)
    f_loc, f_scale = (torch.tensor(values, dtype=torch.float64) for values in zip(*columns, strict=True))
    whole = bm.likelihoods.Outputs(changed) if several else changed[0]
    return Standardized(function, _input_units(tasks), (f_loc, f_scale)), whole  # type: ignore[arg-type]


def _input_units(tasks: bm.Tasks) -> tuple[Tensor, Tensor]:
    """Location and scale of inputs; a constant keeps its scale, a code its value."""
    x = tasks.x.double()
    scale = x.std(0, correction=0) if x.numel() else torch.ones(x.shape[1:], dtype=x.dtype)
    codes = torch.tensor([name in tasks.schema.levels for name in tasks.schema.x], dtype=torch.bool)
    codes = codes if x.shape[1:] == codes.shape else torch.zeros(x.shape[1:], dtype=torch.bool)
    return torch.where(codes, 0.0, x.mean(0)), torch.where((scale > 0) & ~codes, scale, 1.0)


def _columns(part: Any, loc: float, scale: float) -> list[tuple[float, float]]:
    """Location and scale of each of a likelihood's numbers."""
    if not isinstance(part, SCALED):
        return [(0.0, 1.0)] * width(part)
    noise = [(float(torch.tensor(scale).log()), 1.0)] if isinstance(part, bm.likelihoods.LocationScale) else []
    return [(loc, scale), *noise]


def _scaled(part: Any, scale: float) -> Any:
    """A likelihood whose scale has its prior in the units of the labels."""
    if not isinstance(part, bm.likelihoods.Normal | bm.likelihoods.StudentT):
        return part
    return dataclasses.replace(part, prior_scale=part.prior_scale * scale)
