"""Mixture of experts, "experts": a task's features are a weighted mean of several trunks'.

π_i(x) = softmax(g_i + G_i x), f = W_i Σ_e π_ie(x) h_e(x) + b_i: a mixture of functions with a gate of each task.

Deviation from the paper: by name there is no G_i, as the length of x is not known then; `Experts(inputs=…)` has it.

References:
    Ma, Zhao, Yi, Chen, Hong, Chi: Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts, 2018, https://doi.org/10.1145/3219819.3220007
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, Conditioning, Sizes, anew, linear, weights
from bayesmeta.models.conditioning.heads import head_blocks
from bayesmeta.models.sharing import Block
from bayesmeta.models.sharing.blocks import whole


@dataclass(frozen=True)
class Experts(Conditioning):
    """φ_i = (g_i and G_i around 0, W_i, b_i).

    Args:
        count: Number of experts, copies of the trunk with weights of their own.
        inputs: Length of x, a vector, for gates that depend on it; 0 for gates that do not.
    """

    count: int = 4
    inputs: int = 0

    def __post_init__(self) -> None:
        whole(self, count=self.count)
        if self.inputs:
            whole(self, inputs=self.inputs)

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The experts, the trunk the first of them, with gates and heads.

        Raises:
            ValueError: If the trunk has no weights: all experts would be the same.
        """
        if not weights(trunk):
            raise ValueError("experts: expected a trunk with weights, got one without; all experts would be the same")
        return _Experts([trunk, *(anew(trunk) for _ in range(self.count - 1))], sizes, self.inputs)


class _Experts(Conditioned):
    def __init__(self, experts: list[nn.Module], sizes: Sizes, inputs: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        gate = [Block("gate", (len(experts),), 0.0)]
        gate += [Block("gate_slope", (len(experts), inputs), 0.0)] if inputs else []
        self.blocks = head_blocks(sizes, *gate)

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        gate = parts["gate"]
        gate = linear(x, parts["gate_slope"], gate) if "gate_slope" in parts else gate
        h = torch.stack([expert(x) for expert in self.experts], -1)
        mixed = (h * torch.softmax(gate, -1).unsqueeze(-2)).sum(-1)
        return linear(mixed, parts["weight"], parts["bias"])
