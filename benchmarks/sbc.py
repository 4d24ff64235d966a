"""Calibration of the full pipeline: `python -m benchmarks.sbc [--replicates 100] [--seed 0] [--file sbc.json]`.

12 tasks of 8 rows, intercept and slope; every replicate is fitted anew. A rerun with the same file goes on.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm

TASKS, ROWS = 12, 8


def lines(batch: bm.Batch) -> None:
    """Partially pooled lines with proper priors."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, sigma), obs=batch.y)


def counts(batch: bm.Batch) -> None:
    """Counts with a log rate of each task."""
    mu = pyro.sample("mu", dist.Normal(1.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.clamp(max=12.0).exp()), obs=batch.y)


MODELS = {"lines": lines, "counts": counts}


def tasks(kind: str) -> bm.Tasks:
    """Tasks that lend inputs and sizes."""
    x = np.random.default_rng(0).uniform(-1, 1, (TASKS, ROWS, 1))
    labels = np.zeros((TASKS, ROWS), dtype=int if kind == "counts" else float)
    return bm.Tasks.from_arrays(list(x) if kind == "lines" else None, list(labels))


def main() -> None:
    """Runs what is left of the replicates, prints the table and draws the bands beside the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="lines")
    parser.add_argument("--method", default="amortized")
    parser.add_argument("--replicates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = pathlib.Path(options.file or f"sbc-{options.model}-{options.method}-{options.seed}.json")
    found = bm.checks.sbc_fit(
        MODELS[options.model],
        tasks(options.model),
        replicates=options.replicates,
        method=options.method,
        seed=options.seed,
        file=path,
    )
    cpu = [one["cpu"] for one in json.loads(path.read_text())["replicates"]]
    print(f"{options.model}, {options.method}, seed {options.seed}: {np.median(cpu):.1f} CPU s a replicate (median)")
    print(found.table())
    found.plot(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
