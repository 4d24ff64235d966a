"""The task parameters in named blocks, and what all sharing priors have in common.

φ_i is one vector `(d,)`; its blocks (a head's weights and biases, a layer's gates) have scales of their own. A block
whose centre is a number deviates from it; of the others the centre is learned, the shared site `mu`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm


@dataclass(frozen=True)
class Block:
    """A part of φ.

    Args:
        name: What it is ("weight").
        shape: Of one task's values.
        centre: Where tasks lie around; None to learn it.
        free: Whether its scale is learned even where a prior fixes those of all others.
    """

    name: str
    shape: tuple[int, ...]
    centre: float | None = None
    free: bool = False

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Blocks:
    """The blocks of φ, one after the other."""

    all: tuple[Block, ...] = ()

    @property
    def d(self) -> int:
        """Numbers in φ."""
        return sum(block.size for block in self.all)

    @property
    def learned(self) -> int:
        """Numbers in φ whose centre is learned."""
        return sum(block.size for block in self.all if block.centre is None)

    @property
    def names(self) -> list[str]:
        """A name for each number: that of its block, and its place there."""
        return [f"{b.name} {i}" if b.size > 1 else b.name for b in self.all for i in range(b.size)]

    @property
    def index(self) -> Tensor:
        """For each number its block, int64 `(d,)`."""
        return torch.arange(len(self.all)).repeat_interleave(torch.tensor([block.size for block in self.all]))

    def split(self, phi: Tensor) -> dict[str, Tensor]:
        """Cuts φ `(…, d)` into its blocks `(…, *shape)`, by name."""
        parts = phi.split([block.size for block in self.all], -1)
        return {b.name: part.reshape((*phi.shape[:-1], *b.shape)) for b, part in zip(self.all, parts, strict=True)}

    def centre(self, shared: Mapping[str, Tensor]) -> Tensor:
        """Where all tasks lie around `(d,)`: `mu` for the blocks whose centre is learned."""
        parts, taken = [], 0
        for block in self.all:
            if block.centre is None:
                parts.append(shared["mu"][taken : taken + block.size])
                taken += block.size
            else:
                parts.append(torch.full((block.size,), block.centre))
        return torch.cat(parts)


@dataclass(frozen=True)
class Sharing(bm.priors.Prior, abc.ABC):
    """A prior over blocks of task parameters.

    Args:
        loc_scale: Sd of the normal prior of learned centres, in the units of φ.
        sd_scale: Scale of the half-normal priors of scales, in the units of φ.
        blocks: Of φ; `multitask` fills them in.
    """

    loc_scale: float = dataclasses.field(default=10.0, kw_only=True)
    sd_scale: float = dataclasses.field(default=2.5, kw_only=True)
    blocks: Blocks = dataclasses.field(default=Blocks(), kw_only=True, repr=False)

    def __post_init__(self) -> None:
        positive(self, loc_scale=self.loc_scale, sd_scale=self.sd_scale)

    @property
    def d(self) -> int:
        """Numbers in φ."""
        return self.blocks.d

    @property
    def origin(self) -> np.ndarray:
        """Centres of the blocks, 0 where they are learned."""
        return np.concatenate([np.full(block.size, block.centre or 0.0) for block in self.blocks.all])

    @abc.abstractmethod
    def variance(self, shared: Mapping[str, Tensor]) -> Tensor:
        """Prior variance of each number of φ around its centre `(d,)`."""

    def similarity(self, phi: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """How alike tasks are: the correlation of their differences from the centre, in units of the prior.

        Args:
            phi: Joint draws of all tasks `(S, T, d)`.
            shared: Draws of the shared sites, `(S, *event)` each.

        Returns:
            `(T, T)`, 1 on the diagonal; near 0 for a task of which little is known.
        """
        moved = []
        for s, draw in enumerate(phi):
            one = {name: values[s] for name, values in shared.items()}
            moved.append((draw - self.blocks.centre(one)) / self.variance(one).sqrt())
        return correlation(torch.stack(moved))

    def learned_scales(self, shared: Mapping[str, Tensor]) -> Tensor:
        """The learned scales `(…, k)`, one a block or one a number of φ, of θ or draws of it."""
        return shared["tau"]

    @property
    def scaled(self) -> list[str]:
        """What the learned scales are of, by name."""
        return [block.name for block in self.blocks.all]

    def over(self, blocks: Blocks) -> Self:
        """Returns this prior over some blocks."""
        return dataclasses.replace(self, blocks=blocks)

    def centres(self) -> dict[str, Distribution]:
        """The shared site `mu`, where centres are learned."""
        if not self.blocks.learned:
            return {}
        return {"mu": dist.Normal(torch.zeros(self.blocks.learned), self.loc_scale).to_event(1)}

    def scales(self, count: int) -> dict[str, Distribution]:
        """The shared site `tau` `(count,)`."""
        return {"tau": dist.HalfNormal(torch.full((count,), self.sd_scale)).to_event(1)}


OFF_CENTRE = 0.2
"""Of the prior sd: where signs and labels may change places 0 is a saddle, at which an optimiser would not move."""


def off_centre(rows: int, d: int) -> Tensor:
    """A fixed pattern of small numbers `(rows, d)`, all rows different, of length `OFF_CENTRE` a number."""
    pattern = torch.randn(rows, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return OFF_CENTRE * pattern.to(torch.get_default_dtype())


def correlation(draws: Tensor) -> Tensor:
    """E[uᵢ·uⱼ] over draws `(S, T, k)`, divided by the root mean squares of both: `(T, T)`."""
    product = torch.einsum("sik,sjk->ij", draws, draws)
    length = product.diagonal().sqrt().clamp(min=torch.finfo(draws.dtype).tiny ** 0.5)
    return product / (length.unsqueeze(-1) * length)


def positive(owner: object, **numbers: float) -> None:
    """Refuses an option that is no finite positive number.

    Raises:
        ValueError: With its name and value.
    """
    for name, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}: expected {name} as a finite number > 0, got {value!r}")


def whole(owner: object, **numbers: int) -> None:
    """Refuses an option that is no whole number ≥ 1.

    Raises:
        ValueError: With its name and value.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(owner).__name__}: expected {name} as a whole number ≥ 1, got {value!r}")
