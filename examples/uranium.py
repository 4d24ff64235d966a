"""Task-level covariates: the uranium in a county's soil says what to expect of its homes before one is measured.

The radon model, with the prior mean of a county's basement level a line in its log uranium. Explaining counties by
their soil leaves less variation between them, so that a county without measurements is predicted better.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm

DATA = pathlib.Path(bm.__file__).parent / "data" / "radon.csv"


def radon(batch: bm.Batch) -> None:
    """County levels ~ N(mu + gamma × log uranium, tau), one effect of the floor."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    gamma = pyro.sample("gamma", dist.Normal(0.0, 10.0))
    floor = pyro.sample("floor", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        level = pyro.sample("level", dist.Normal(mu + gamma * batch["log_uranium"], tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(level + floor * batch.x[..., 0], sigma), obs=batch.y)


def main(*, steps: int | None = None, progress: bool = True) -> dict[str, float]:
    """Fits, and returns the effect of uranium, what it leaves unexplained, and predictions for two kinds of soil.

    Args:
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    counties = bm.Tasks.from_dataframe(
        pandas.read_csv(DATA), task="county", x=["floor"], y="log_radon", task_columns=["log_uranium"]
    )
    fit = bm.fit(radon, counties, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    print(fit)
    uranium = counties.task_columns["log_uranium"].numpy()
    ends = counties.copies([int(np.argmin(uranium)), int(np.argmax(uranium))], names=["poor soil", "rich soil"])
    unseen, _ = ends.split_rows(torch.zeros(len(ends.y), dtype=torch.bool))
    predicted = fit.prior_predict(np.zeros((1, 1)), like=unseen)
    lower, upper = (np.exp(end[:, 0]) for end in predicted.interval())
    for name, low, high in zip(predicted.names, lower, upper, strict=True):
        print(f"a basement in a county never measured, {name}: 90 % of homes from {low:.1f} to {high:.1f} pCi/L")
    means = predicted.mean[:, 0]
    return {
        "gamma": float(fit.shared.mean("gamma")),
        "tau": float(fit.shared.mean("tau")),
        "rich minus poor": float(means[1] - means[0]),
        "expected difference": float(fit.shared.mean("gamma")) * float(uranium.max() - uranium.min()),
    }


if __name__ == "__main__":
    main()
