"""What a conditioning is: options that build a module of φ and x, which names the blocks of φ that it reads."""

from __future__ import annotations

import abc
import copy
from dataclasses import dataclass

from torch import Tensor, nn

from bayesmeta.models.sharing import Blocks


@dataclass(frozen=True)
class Sizes:
    """How wide a function is.

    Attributes:
        features: Numbers that the trunk gives for a row.
        outputs: Numbers that the likelihood takes for a row.
    """

    features: int
    outputs: int


class Conditioned(nn.Module):
    """A function of φ_i and x: f `(T, N, outputs)` for φ `(T, 1, d)` and x `(T, N, *dx)`.

    Attributes:
        blocks: The blocks of φ.
        scalar: Whether f has one number a row, `(T, N)`.
    """

    blocks: Blocks
    scalar = False

    def forward(self, phi: Tensor, x: Tensor) -> Tensor:
        """Cuts φ into its blocks and evaluates."""
        f = self.evaluate(self.blocks.split(phi), x)
        return f.squeeze(-1) if self.scalar else f

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        """The function's value, φ given as blocks `(T, 1, *shape)`."""
        raise NotImplementedError


class Conditioning(abc.ABC):
    """Options of a conditioning."""

    @abc.abstractmethod
    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The function with fresh heads and layers; a trunk is used as it is, not copied."""


def linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of each task: h `(T, N, H)`, weight `(T, 1, K, H)`, bias `(T, 1, K)` -> `(T, N, K)`.

    Raises:
        ValueError: If h has another number of features than the weights.
    """
    if h.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"multitask: expected {weight.shape[-1]} numbers a row, as features= says or the last linear layer, got "
            f"{h.shape[-1]} from the trunk (without a trunk: from x); give their number as features="
        )
    return (weight * h.unsqueeze(-2)).sum(-1) + bias


def anew(module: nn.Module) -> nn.Module:
    """A copy of a module with weights of its own.

    Raises:
        ValueError: If a part has weights and no `reset_parameters`: the copy would be the same.
    """
    fresh = copy.deepcopy(module)
    for part in fresh.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in part.parameters(recurse=False)):
            raise ValueError(
                f"expected a trunk whose parts draw their weights anew, got {type(part).__name__} without "
                "reset_parameters; define it, so that streams and experts differ"
            )
    return fresh


def weights(module: nn.Module) -> int:
    """How many weights a module has."""
    return sum(weight.numel() for weight in module.parameters())
