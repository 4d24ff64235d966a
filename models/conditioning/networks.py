"""A network for each task: every weight of trunk and head is the task's own, "independent".

φ_i is what the weights differ from the shared ones by. A learned scale pools the networks softly; a large fixed one
leaves them independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, Conditioning, Sizes
from bayesmeta.models.sharing import Block, Blocks


@dataclass(frozen=True)
class Networks(Conditioning):
    """f = head_i(trunk_i(x)), the weights of both θ + φ_i."""

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The trunk and a linear head as one network."""
        return _Networks(nn.Sequential(trunk, nn.Linear(sizes.features, sizes.outputs)))


class _Networks(Conditioned):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.blocks = Blocks(
            tuple(Block(name.replace(".", "_"), tuple(w.shape), 0.0) for name, w in net.named_parameters())
        )

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        own = {name: w + parts[name.replace(".", "_")][:, 0] for name, w in self.net.named_parameters()}

        def one(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(self.net, weights, (rows.unsqueeze(0),))
            return result.squeeze(0)

        return torch.func.vmap(one)(own, x)
