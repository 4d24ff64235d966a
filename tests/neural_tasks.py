"""Small tasks for the tests of neural processes."""

from __future__ import annotations

import numpy as np

import bayesmeta as bm


def ragged(sizes: tuple[int, ...] = (4, 1, 0, 3), dx: int = 1, seed: int = 0) -> bm.Tasks:
    """Wavy labels of vectors x; one task of each size."""
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=(n, dx)) for n in sizes]
    return bm.Tasks.from_arrays(x, [np.sin(row.sum(-1)) + 0.1 * rng.normal(size=len(row)) for row in x])
