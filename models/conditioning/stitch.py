"""Cross-stitch and sluice networks, "cross_stitch": after every layer a task mixes the features of several streams.

h_i^(l+1) = Σ_s a_is^l layer_s^l(h_i^l): for linear layers with independent weights the tasks' functions have covariance
A Aᵀ ⊗ K (coregionalisation); A = I leaves tasks independent, equal rows share all. With subspaces each part of a layer
has weights of its own, and with `skip` the head sees Σ_l b_i^l h_i^l: a sluice network.

Deviations: streams are shared by all tasks, where the papers have one stream a task, so that there may be more tasks
than streams and a new task can infer its weights; no penalty keeps subspaces orthogonal.

References:
    Misra, Shrivastava, Gupta, Hebert: Cross-stitch Networks for Multi-task Learning, 2016,
    https://arxiv.org/abs/1604.03539
    Ruder, Bingel, Augenstein, Søgaard: Latent Multi-task Architecture Learning, 2019, https://arxiv.org/abs/1705.08142
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, Conditioning, Sizes, anew, weights
from bayesmeta.models.sharing import Block, Blocks
from bayesmeta.models.sharing.blocks import whole


@dataclass(frozen=True)
class Stitch(Conditioning):
    """φ_i = weights of the streams after each layer, around 1/streams, and of the layers, around 1/layers.

    Args:
        streams: Number of streams, copies of the trunk with weights of their own.
        subspaces: Parts that a layer's features are cut into.
        skip: Whether the head sees a weighted mean of all layers; they must be equally wide.
    """

    streams: int = 2
    subspaces: int = 1
    skip: bool = False

    def __post_init__(self) -> None:
        whole(self, streams=self.streams, subspaces=self.subspaces)

    def build(self, trunk: nn.Module, sizes: Sizes) -> Conditioned:
        """The streams, the trunk the first of them, with one head; the children of a Sequential are its layers.

        Raises:
            ValueError: If the trunk has no weights: all streams would be the same.
        """
        if not weights(trunk):
            raise ValueError("cross_stitch: expected a trunk with weights, got one without; all streams would be alike")
        streams = [trunk, *(anew(trunk) for _ in range(self.streams - 1))]
        return _Stitch([_layers(stream) for stream in streams], sizes, self)


def _layers(stream: nn.Module) -> list[nn.Module]:
    """Layers with weights, each with what follows it up to the next."""
    parts = list(stream) if isinstance(stream, nn.Sequential) else [stream]
    weighted = [i for i, part in enumerate(parts) if weights(part)]
    starts = [0, *weighted[1:], len(parts)]
    return [nn.Sequential(*parts[a:b]) for a, b in pairwise(starts)]


class _Stitch(Conditioned):
    def __init__(self, streams: list[list[nn.Module]], sizes: Sizes, options: Stitch) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList(same) for same in zip(*streams, strict=True)])
        self.head = nn.Linear(sizes.features, sizes.outputs)
        self.subspaces = options.subspaces
        shape = (options.streams, options.subspaces)
        blocks = [Block(f"stitch_{i}", shape, 1 / options.streams) for i in range(len(self.layers))]
        blocks += [Block("skip", (len(self.layers),), 1 / len(self.layers))] if options.skip else []
        self.blocks = Blocks(tuple(blocks))

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        h, seen = x, []
        for i, streams in enumerate(self.layers):
            each = [layer(h) for layer in cast(nn.ModuleList, streams)]
            h = self._mixed(torch.stack(each, -2), parts[f"stitch_{i}"])
            seen.append(h)
        if "skip" in parts:
            if len(widths := {layer.shape[-1] for layer in seen}) > 1:
                raise ValueError(f"skip: expected layers that are equally wide, got widths {sorted(widths)}")
            h = (torch.stack(seen, -1) * parts["skip"].unsqueeze(-2)).sum(-1)
        result: Tensor = self.head(h)
        return result

    def _mixed(self, features: Tensor, weights: Tensor) -> Tensor:
        """Features `(T, N, S, H)` of S streams and weights `(T, 1, S, G)` -> `(T, N, H)`."""
        if features.shape[-1] % self.subspaces:
            raise ValueError(
                f"subspaces: expected layers that can be cut into {self.subspaces} equal parts, got one with "
                f"{features.shape[-1]} features"
            )
        cut = features.unflatten(-1, (self.subspaces, -1))
        return (cut * weights.unsqueeze(-1)).sum(-3).flatten(-2)
