"""Heads of the tasks on a shared trunk: f_i(x) = W_i h(x) + b_i, "multi_head"; one head for all is "hard".

References:
    Caruana: Multitask Learning, 1997, https://doi.org/10.1023/A:1007379606734
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, Conditioning, Sizes, linear
from bayesmeta.models.sharing import Block, Blocks


@dataclass(frozen=True)
class Heads(Conditioning):
    """φ_i = (W_i, b_i), their centre learned: partial pooling of heads."""

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The trunk with a head from φ."""
        return _Heads(trunk, sizes)


class _Heads(Conditioned):
    def __init__(self, trunk: nn.Module, sizes: Sizes) -> None:
        super().__init__()
        self.trunk, self.blocks = trunk, head_blocks(sizes)

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        return linear(self.trunk(x), parts["weight"], parts["bias"])


def head_blocks(sizes: Sizes, *others: Block) -> Blocks:
    """Some blocks, and those of a head."""
    head = Block("weight", (sizes.outputs, sizes.features)), Block("bias", (sizes.outputs,))
    return Blocks((*others, *head))
