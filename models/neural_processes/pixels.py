"""Images as sets of pixels: a row is a place and its colour, an image a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import bayesmeta as bm


def pixel_tasks(images: Any, *, names: Sequence[str] | None = None) -> bm.Tasks:
    """Turns images into tasks with one row a pixel.

    Args:
        images: `(T, height, width)`, or `(T, height, width, channels)` for several numbers a pixel.
        names: One name an image; None counts them.

    Returns:
        Tasks with x `(height × width, 2)`, down and right, from -1 to 1 along the longer side, and y the pixel.

    Raises:
        ValueError: If the array has another number of dimensions.

    Example:
        >>> pixel_tasks(np.zeros((2, 3, 3))).x[:2].tolist()
        [[-1.0, -1.0], [-1.0, 0.0]]
    """
    array = np.asarray(images)
    if array.ndim not in (3, 4) or not array.size:
        raise ValueError(
            f"pixel_tasks: expected images (T, height, width) or (T, height, width, channels), got {array.shape}"
        )
    height, width = array.shape[1:3]
    half = max(height, width, 2) - 1
    down, right = np.meshgrid(*((2 * np.arange(n) - (n - 1)) / half for n in (height, width)), indexing="ij")
    x = np.stack([down.ravel(), right.ravel()], -1)
    y = array.reshape(len(array), height * width, *array.shape[3:])
    return bm.Tasks.from_arrays([x] * len(array), list(y), names=names)
