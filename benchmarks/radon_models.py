"""The radon models and data that several benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist

import bayesmeta as bm

EXACT = Path(__file__).parents[1] / "tests" / "data" / "exact"
HOMES = Path(bm.__file__).parent / "data" / "radon.csv"


def intercepts(batch: bm.Batch) -> None:
    """One intercept a county, one slope of the floor for all."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    tau = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with batch.tasks():
        alpha = pyro.sample("alpha", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(alpha + beta * batch.x[..., 0], sigma), obs=batch.y)


def slopes(batch: bm.Batch) -> None:
    """An intercept and a slope of the floor a county."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, sigma), obs=batch.y)


def counties() -> bm.Tasks:
    """919 homes in 85 counties, the counties in the order of the exact posteriors."""
    homes = pd.read_csv(HOMES).sort_values("county", kind="stable")
    return bm.Tasks.from_dataframe(homes, task="county", x=["floor"], y="log_radon")


def exact(posterior: str) -> dict[str, tuple[float, float]]:
    """Exact posterior means and sds by name."""
    lines = json.loads((EXACT / posterior / "exact_moments.json").read_text())["summary"]
    return {line["name"]: (line["mean"], line["sd"]) for line in lines}


def exact_tasks(moments: dict[str, tuple[float, float]], names: tuple[str, ...], tasks: int) -> np.ndarray:
    """Exact means and sds of task parameters: `(2, task, parameter)`."""
    pairs = [[moments[f"{name}.{i + 1}"] for name in names] for i in range(tasks)]
    return np.moveaxis(np.array(pairs), -1, 0)
