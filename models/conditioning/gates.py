"""Gates that depend on the input, "gates": a task attends to features of the shared trunk.

a_i(x) = sigmoid(u_i ⊙ G h(x) + c_i), f = W_i (a_i ⊙ h) + b_i. All gates open is hard sharing of the features, gates
that do not overlap are independent tasks.

Deviation from the paper: one gated layer, and a gate of two numbers a feature for each task in place of convolutions of
its own, so that a new task can infer it from few rows.

References:
    Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention, 2019, https://arxiv.org/abs/1803.10704
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, Conditioning, Sizes, linear
from bayesmeta.models.conditioning.heads import head_blocks
from bayesmeta.models.sharing import Block


@dataclass(frozen=True)
class Gates(Conditioning):
    """φ_i = (u_i around 1, c_i around 0, W_i, b_i)."""

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The trunk with gates and heads."""
        return _Gates(trunk, sizes)


class _Gates(Conditioned):
    def __init__(self, trunk: nn.Module, sizes: Sizes) -> None:
        super().__init__()
        width = (sizes.features,)
        self.trunk, self.gate = trunk, nn.Linear(sizes.features, sizes.features)
        self.blocks = head_blocks(sizes, Block("slope", width, 1.0), Block("offset", width, 0.0))

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        h = self.trunk(x)
        gate = torch.sigmoid(parts["slope"] * self.gate(h) + parts["offset"])
        return linear(gate * h, parts["weight"], parts["bias"])
