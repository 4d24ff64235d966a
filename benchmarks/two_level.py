"""A two-level normal model whose whole data sets are tasks: `python -m benchmarks.two_level [--help]`.

μ ~ N(0, 1), τ, σ ~ HalfNormal(1), six groups of ten rows: nine parameters a data set, a known prior, the group of a row
in a column. One guide is learned from simulated data sets; 200 others are held against quadrature over (τ, σ), before
and after the ladder.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm

GROUPS, ROWS = 6, 10
SITES = ("mu", "tau", "sigma", "group")
UNREFINED, REFINED, WORST = 0.2, 0.1, 0.3
"""Bounds on rms errors of means without and with the ladder, and on that of an unflagged task, in exact sds."""


def two_level(batch: bm.Batch) -> None:
    """Groups within a data set."""
    with batch.tasks():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        around, spread = (value.unsqueeze(-1).expand(*value.shape, GROUPS) for value in (mu, tau))
        group = pyro.sample("group", dist.Normal(around, spread).to_event(1))
        with batch.observations():
            mean = group.squeeze(-2).gather(-1, batch["group"])
            pyro.sample("y", dist.Normal(mean, sigma), obs=batch.y)


def simulate(count: int, seed: int) -> bm.Tasks:
    """Data sets drawn from the prior."""
    rng = np.random.default_rng(seed)
    mu, tau, sigma = rng.normal(size=count), np.abs(rng.normal(size=count)), np.abs(rng.normal(size=count))
    means = mu[:, None] + tau[:, None] * rng.normal(size=(count, GROUPS))
    y = means[..., None] + sigma[:, None, None] * rng.normal(size=(count, GROUPS, ROWS))
    index = np.repeat(np.arange(GROUPS), ROWS)
    names = [f"{seed}/{i}" for i in range(count)]
    return bm.Tasks.from_arrays(None, list(y.reshape(count, -1)), columns={"group": [index] * count}, names=names)


def exact(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and sds of (μ, τ, σ, group means) of one data set `(GROUPS, ROWS)`, by the trapezoidal rule.

    Over (log τ, log σ); given those everything is Gaussian.
    """
    tau, sigma = (np.exp(np.linspace(low, high, n)) for low, high, n in ((-9.0, 1.8, 500), (-7.0, 1.8, 900)))
    tau, sigma = tau[:, None], sigma[None, :]
    means, squares = y.mean(1), ((y - y.mean(1, keepdims=True)) ** 2).sum()
    spread, within = tau**2 + sigma**2 / ROWS, sigma**2 / ROWS
    precision = 1 + GROUPS / spread
    centre = means.sum() / spread / precision
    quadratic = (means**2).sum() / spread - centre**2 * precision
    log_density = -0.5 * (quadratic + GROUPS * np.log(spread) + np.log(precision) + squares / sigma**2)
    log_density += -GROUPS * (ROWS - 1) * np.log(sigma) - 0.5 * (tau**2 + sigma**2) + np.log(tau) + np.log(sigma)
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    keep = tau**2 / spread
    local = keep * means[:, None, None] + (1 - keep) * centre
    first = [centre, tau, sigma, *local]
    local_var = keep * within + (1 - keep) ** 2 / precision
    second = [centre**2 + 1 / precision, tau**2, sigma**2, *(local**2 + local_var)]
    mean, square = (np.array([(weight * part).sum() for part in parts]) for parts in (first, second))
    return mean, np.sqrt(square - mean**2)


def moments(post: bm.Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and sds `(T, 3 + GROUPS)`."""
    found = [[f(site).reshape(len(post.names), -1) for site in SITES] for f in (post.mean, post.sd)]
    return np.concatenate(found[0], 1), np.concatenate(found[1], 1)


def report(label: str, post: bm.Posterior, truth: tuple[np.ndarray, np.ndarray], bar: float, seconds: float) -> None:
    """Prints rms errors of posterior means in exact sds."""
    error = (moments(post)[0] - truth[0]) / truth[1]
    ratio = moments(post)[1] / truth[1]
    parts = {"mu": error[:, 0], "tau": error[:, 1], "sigma": error[:, 2], "groups": error[:, 3:]}
    rms = {name: float(np.sqrt((part**2).mean())) for name, part in parts.items()}
    fine = all(value <= bar for value in rms.values())
    said = ", ".join(f"{name} {value:.3f}" for name, value in rms.items())
    print(f"{label} ({seconds:.0f} s): rms {said} (bar {bar}){'' if fine else '   MISSED'}", flush=True)
    good = post.flag == ""
    worst = np.abs(error).max(1)[good].max() if good.any() else np.nan
    missed = "   MISSED" if bar == REFINED and worst > WORST else ""
    print(
        f"  {dict(Counter(post.method))}, {int((~good).sum())} flagged; sd ratios {ratio.min():.2f}-{ratio.max():.2f}; "
        f"worst unflagged {worst:.3f} sd (bar {WORST} after the ladder){missed}"
    )


def main() -> None:
    """Learns the guide and prints errors without and with the ladder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--family", choices=("normal", "flow"), default="normal")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--draws", type=int, default=2000)
    options = parser.parse_args()
    start = time.perf_counter()
    method = bm.Amortized(family=options.family, optimizer=bm.Optimizer(steps=options.steps))
    fit = bm.fit(two_level, simulate(options.simulations, 0), method=method, progress=False)
    print(f"fit of {options.simulations} data sets: {time.perf_counter() - start:.0f} s", flush=True)
    tasks = simulate(options.tasks, 1)
    ys = [task.y.double().numpy().reshape(GROUPS, ROWS) for task in tasks]
    found = [exact(y) for y in ys]
    truth = np.array([mean for mean, _ in found]), np.array([sd for _, sd in found])
    for label, refine, bar in (("amortized, unrefined", "none", UNREFINED), ("after the ladder", "auto", REFINED)):
        start = time.perf_counter()
        post = fit.posterior(tasks, draws=options.draws, refine=refine)
        report(label, post, truth, bar, time.perf_counter() - start)
        if refine == "auto":
            accepted = float(np.mean(post.method == "psis"))
            print(f"  accepted at the amortized rung {accepted:.0%} (bar 80 %){'' if accepted >= 0.8 else '   MISSED'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
