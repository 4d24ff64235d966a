"""Twelve outputs in two groups that respond to inputs the opposite way: sharing all of them hurts.

Friedman's function with coefficients of each output, measured at inputs of its own. The exchangeable prior learns that
outputs differ; a learned covariance of tasks finds the groups, and predicts better from few rows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

import bayesmeta as bm

GROUPS = np.array([1.0, -1.0]).repeat(6)
COEFFICIENTS = np.array([2.0, 1.5, 1.0, 0.5])
SPREAD, NOISE = 0.15, 0.7


class Friedman(nn.Module):
    """The terms of Friedman's function, each with mean 0 and sd 1: `(T, N, 5)` -> `(T, N, 4)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Terms of inputs in the unit cube."""
        terms = [torch.sin(math.pi * x[..., 0] * x[..., 1]), (x[..., 2] - 0.5) ** 2, x[..., 3], x[..., 4]]
        centre, scale = (0.5246, 1 / 12, 0.5, 0.5), (0.3354, 0.0745, 0.2887, 0.2887)
        return torch.stack([(t - c) / s for t, c, s in zip(terms, centre, scale, strict=True)], -1)


def outputs(rows: int, seed: int) -> bm.Tasks:
    """Twelve outputs, a task each, measured at rows of their own."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(size=(len(GROUPS), rows, 5))
    weight = GROUPS[:, None] * COEFFICIENTS + SPREAD * generator.normal(size=(len(GROUPS), 4))
    y = np.einsum("tnk,tk->tn", Friedman()(torch.as_tensor(x)).numpy(), weight)
    names = [f"output {i + 1}" for i in range(len(GROUPS))]
    return bm.Tasks.from_arrays(list(x), list(y + NOISE * generator.normal(size=y.shape)), names=names)


def main(
    *, rows: int = 12, folds: int = 3, draws: int = 500, picture: str | None = "task_clusters.png"
) -> dict[str, float]:
    """Compares ways of sharing; returns the gain of the learned covariance and how clearly it finds the groups.

    Args:
        rows: Rows of each output.
        folds: Folds of the rows.
        draws: Draws of every posterior.
        picture: Where to save the picture of similar tasks; None for none.
    """
    tasks = outputs(rows, seed=1)
    models = {
        "exchangeable": bm.models.multitask(Friedman(), features=4, sharing="gaussian"),
        "factors": bm.models.multitask(Friedman(), features=4, sharing="factors"),
    }
    method = bm.Marginal(shared="normal", chains=2, draws=draws)
    scores = bm.compare_sharing(models, tasks, folds=folds, context=None, method=method, draws=draws)
    print(scores.table())
    fit = bm.fit(models["factors"], tasks, method=method, progress=False)
    post = fit.posterior(tasks, draws=draws)
    alike = models["factors"].similarity(post)
    same = np.equal.outer(GROUPS, GROUPS) & ~np.eye(len(GROUPS), dtype=bool)
    within, between = float(alike[same].mean()), float(alike[GROUPS[:, None] != GROUPS].mean())
    print(f"similarity of tasks: {within:.2f} within the groups, {between:.2f} between them")
    if picture is not None:
        models["factors"].plot_similarity(post, picture)
        print(f"picture: {picture}")
    gain, error = scores.total("factors", over="exchangeable")
    pooled, _ = scores.total("complete pooling", over="no pooling")
    return {"gain": gain, "error": error, "pooling": pooled, "within": within, "between": between}


if __name__ == "__main__":
    main()
