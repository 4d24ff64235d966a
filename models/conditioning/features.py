"""Task parameters inside a shared network, between its trunk h(x) and one head for all tasks.

*concat*: a layer of [h; z_i]. *additive*: a layer of h plus V z_i, the same family, a random intercept.
*multiplicative*: the features times g_i, a random slope of each. *film*: both, γ_i h + β_i, at two numbers a feature.

References:
    Perez, Strub, de Vries, Dumoulin, Courville: FiLM: Visual Reasoning with a General Conditioning Layer, 2018,
    https://arxiv.org/abs/1709.07871
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, Conditioning, Sizes
from bayesmeta.models.sharing import Block, Blocks
from bayesmeta.models.sharing.blocks import whole


@dataclass(frozen=True)
class _Coded(Conditioning):
    """A code z_i of each task, around 0, inside a layer behind the trunk.

    Args:
        size: Numbers in z_i.
    """

    size: int = 4

    def __post_init__(self) -> None:
        whole(self, size=self.size)


class _Layer(Conditioned):
    """A trunk, a layer of `inputs` numbers and a head, with a code of each task."""

    def __init__(self, trunk: nn.Module, sizes: Sizes, size: int, inputs: int) -> None:
        super().__init__()
        self.trunk, self.blocks = trunk, Blocks((Block("z", (size,), 0.0),))
        self.layer = nn.Linear(inputs, sizes.features)
        self.head = nn.Linear(sizes.features, sizes.outputs)


@dataclass(frozen=True)
class Concat(_Coded):
    """f = head(tanh(W [h; z_i])), z_i around 0.

    Args:
        size: Numbers in z_i.
    """

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The trunk with a layer and a head."""
        return _Concat(trunk, sizes, self.size, sizes.features + self.size)


class _Concat(_Layer):
    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        h = self.trunk(x)
        z = parts["z"].expand(*h.shape[:2], -1)
        result: Tensor = self.head(torch.tanh(self.layer(torch.cat([h, z], -1))))
        return result


@dataclass(frozen=True)
class Additive(_Coded):
    """f = head(tanh(W h + V z_i)), z_i around 0.

    Args:
        size: Numbers in z_i.
    """

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The trunk with a layer and a head."""
        return _Additive(trunk, sizes, self.size, sizes.features)


class _Additive(_Layer):
    def __init__(self, trunk: nn.Module, sizes: Sizes, size: int, inputs: int) -> None:
        super().__init__(trunk, sizes, size, inputs)
        self.code = nn.Linear(size, sizes.features, bias=False)

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.layer(self.trunk(x)) + self.code(parts["z"])))
        return result


@dataclass(frozen=True)
class Multiplicative(Conditioning):
    """f = head(g_i h), g_i around 1."""

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The trunk with a head."""
        return _Scaled(trunk, sizes, Blocks((Block("scale", (sizes.features,), 1.0),)))


@dataclass(frozen=True)
class FiLM(Conditioning):
    """f = head(γ_i h + β_i), γ_i around 1 and β_i around 0."""

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The trunk with a head."""
        width = (sizes.features,)
        return _Scaled(trunk, sizes, Blocks((Block("scale", width, 1.0), Block("shift", width, 0.0))))


class _Scaled(Conditioned):
    def __init__(self, trunk: nn.Module, sizes: Sizes, blocks: Blocks) -> None:
        super().__init__()
        self.trunk, self.blocks = trunk, blocks
        self.head = nn.Linear(sizes.features, sizes.outputs)

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        h = parts["scale"] * self.trunk(x)
        result: Tensor = self.head(h + parts["shift"] if "shift" in parts else h)
        return result
