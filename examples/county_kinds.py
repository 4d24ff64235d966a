"""Counties that report in different ways: half of them radon levels, half only whether a home is above the limit.

Both see the same level; a censored report is a likelihood of one's own, with the noise that the others teach. Homes of
Minnesota that ship with the package; the full reports of the second half are kept back, as the truth.
"""

from __future__ import annotations

import importlib.resources
import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor

import bayesmeta as bm

LIMIT = math.log(4.0)
"""The action level of 4 pCi/L, on the log scale."""


def above_limit(f: Tensor, shared: dict[str, Tensor]) -> dist.Bernoulli:
    """Whether a home with expected log level f is above the limit, the noise that of the counties with levels."""
    return dist.Bernoulli(torch.special.ndtr((f - LIMIT) / shared["sigma_y_level"]))


def counties() -> tuple[bm.Tasks, pd.DataFrame]:
    """The homes as every county reports them, and all levels."""
    with importlib.resources.files("bayesmeta.data").joinpath("radon.csv").open() as file:
        homes = pd.read_csv(file)
    homes["report"] = np.where(homes["county"].rank(method="dense") % 2 == 0, "level", "above")
    homes["y"] = np.where(homes["report"] == "level", homes["log_radon"], homes["log_radon"] > LIMIT)
    return bm.Tasks.from_dataframe(homes, task="county", x="floor", y="y", task_columns="report"), homes


def main(*, steps: int | None = None, progress: bool = True) -> dict[str, float]:
    """Fits both kinds of counties; returns how well the levels of homes are foreseen where none was reported.

    Args:
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    tasks, homes = counties()
    likelihood = bm.likelihoods.Kinds("report", {"level": bm.likelihoods.Normal(), "above": above_limit})
    model = bm.models.multitask(features=1, likelihood=likelihood)
    fit = bm.fit(model, tasks, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    post = fit.posterior(tasks)
    print(post.summary().head())
    hidden = homes[homes["report"] == "above"]
    place = {name: i for i, name in enumerate(post.names)}
    index = hidden["county"].map(place).to_numpy()
    phi, sigma = post.draws("phi")[:, index], post.shared["sigma_y_level"][:, None]
    level = phi[..., 0] * hidden["floor"].to_numpy() + phi[..., 1]
    drawn = level + sigma * np.random.default_rng(0).normal(size=level.shape)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    truth = hidden["log_radon"].to_numpy()
    inside = float(((truth > low) & (truth < high)).mean())
    flagged = float((post.flag != "").sum())
    print(f"homes whose level nobody reported: {inside:.1%} of {len(truth)} lie in their 90 % interval")
    return {"inside": inside, "flagged": flagged}


if __name__ == "__main__":
    main()
