"""Embeddings of images, and what few-shot classifiers make of embedded rows: `prototypes.py` and `versa.py` call this.

References:
    Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning, 2017, https://arxiv.org/abs/1703.05175
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bayesmeta as bm

CHUNK_ROWS = 1024
"""Rows that are embedded at once outside training: the memory of large evaluations stays bounded."""


class RandomAffine(nn.Module):
    """Turns, scales, shears and shifts every image at random while training; in evaluation images stay as they are.

    Args:
        turn: Largest angle, in degrees.
        scale: Largest relative change of height and of width.
        shear: Largest shear.
        shift: Largest shift, as a share of half the image.
    """

    def __init__(self, *, turn: float = 15.0, scale: float = 0.12, shear: float = 0.2, shift: float = 0.14) -> None:
        super().__init__()
        self.turn, self.scale, self.shear, self.shift = math.radians(turn), scale, shear, shift

    def forward(self, images: Tensor) -> Tensor:
        """Images `(R, C, H, W)` with black outside."""
        if not self.training:
            return images
        angle, shear, stretch_x, stretch_y, *shifts = images.new_empty(6, len(images)).uniform_(-1, 1)
        cosine, sine, shear = (self.turn * angle).cos(), (self.turn * angle).sin(), self.shear * shear
        wide, high = 1 + self.scale * stretch_x, 1 + self.scale * stretch_y
        across = torch.stack([cosine * wide, shear * cosine - sine * high, self.shift * shifts[0]], -1)
        down = torch.stack([sine * wide, shear * sine + cosine * high, self.shift * shifts[1]], -1)
        grid = nn.functional.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, align_corners=False)


class Conv4(nn.Module):
    """Four convolutions with batch normalisation: images `(R, H, W)` or `(R, C, H, W)` to `(R, features)`.

    The first has stride 2, so that most work is done on small maps: 28 × 28 becomes 14, 7 and 3. Batch statistics are
    used in training alone; in evaluation a task's predictions do not depend on what else is in the batch.

    Args:
        width: Channels of each layer.
        channels: Channels C of the images.
        size: Height and width of the images, in pixels.
        augment: Module applied to the images `(R, C, H, W)` first, such as `RandomAffine()`; None leaves them.

    Attributes:
        features: Numbers that an image becomes.
    """

    def __init__(self, *, width: int = 64, channels: int = 1, size: int = 28, augment: nn.Module | None = None) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.augment = nn.Identity() if augment is None else augment
        layers = [
            *_layer(channels, width, kernel=5, stride=2),
            *_layer(width, width),
            nn.MaxPool2d(2),
            *_layer(width, width),
            nn.MaxPool2d(2),
            *_layer(width, width),
            nn.Flatten(),
        ]
        self.layers = nn.Sequential(*layers)
        self.features = width * ((size + 1) // 2 // 4) ** 2

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images.

        Raises:
            ValueError: They have another shape than said.
        """
        expected = (self.channels, self.size, self.size)
        images = images.unsqueeze(1) if images.dim() == 3 else images
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"Conv4: expected images of shape {expected}, got {tuple(images.shape[1:])}; give channels= and size="
            )
        features: Tensor = self.layers(self.augment(images).contiguous(memory_format=torch.channels_last))
        return features


def _layer(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def embedded(embed: nn.Module, context: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Embeds the rows of contexts `(T, N, *dx)` and new rows `(T, M, *dx)`: `(T, N, D)` and `(T, M, D)`.

    All rows go through the module at once in training, so that both sides share their batch statistics.
    """
    rows = torch.cat([context.flatten(0, 1), x.flatten(0, 1)])
    h = embed(rows) if embed.training else torch.cat([embed(part) for part in rows.split(CHUNK_ROWS)])
    old, new = h.split([context.shape[0] * context.shape[1], x.shape[0] * x.shape[1]])
    return old.unflatten(0, context.shape[:2]), new.unflatten(0, x.shape[:2])


@dataclass(frozen=True)
class Classes:
    """What contexts say about each of K classes.

    Attributes:
        means: Mean embedding `(T, K, D)`; zeros where there is no row.
        counts: Rows of each class `(T, K)`.
        possible: Bool `(T, K)`: whether the task may have the class.
    """

    means: Tensor
    counts: Tensor
    possible: Tensor


def by_class(h: Tensor, context: bm.Batch, classes: int | None) -> Classes:
    """Averages embedded rows by class.

    Args:
        h: Embedded rows of the context `(T, N, D)`.
        context: The rows, with whole numbers as labels.
        classes: Number K of classes; None: a task has those up to the largest label of its own context.

    Raises:
        ValueError: Labels are no whole numbers from 0 to K - 1, or K is not known.
    """
    if context.y.dim() != 2 or not bool((context.y == context.y.long()).all()):
        raise ValueError(
            f"expected classes as labels, one whole number a row, got {context.y.dtype} of shape "
            f"{tuple(context.y.shape[2:])}; number the classes 0, 1, …"
        )
    y = context.y.long()
    largest = torch.where(context.observed, y, -1).amax(1)
    _check_labels(context, largest, classes)
    count = int(largest.max()) + 1 if classes is None else classes
    member = nn.functional.one_hot(y.clamp(0, count - 1), count) * context.observed.unsqueeze(-1)
    counts = member.sum(1).to(h.dtype)
    means = (member.to(h.dtype).mT @ h) / counts.clamp(min=1).unsqueeze(-1)
    limit = largest + 1 if classes is None else torch.full_like(largest, count)
    return Classes(means, counts, torch.arange(count) < limit.unsqueeze(-1))


def _check_labels(context: bm.Batch, largest: Tensor, classes: int | None) -> None:
    smallest = torch.where(context.observed, context.y, 0).amin(1)
    wrong = (smallest < 0) | (largest >= (largest.max() + 1 if classes is None else classes))
    if bool(wrong.any()):
        task, last = int(wrong.nonzero()[0]), "" if classes is None else f" to {classes - 1}"
        raise ValueError(
            f"task {context.names[task]!r}: expected labels from 0{last}, got {int(smallest[task])} to "
            f"{int(largest[task])}; renumber them or give classes="
        )
    if classes is None and bool((largest < 0).any()):
        task = int((largest < 0).nonzero()[0])
        raise ValueError(
            f"task {context.names[task]!r} has no context, so that its number of classes is unknown; give classes="
        )
