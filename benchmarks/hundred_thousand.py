"""100,000 tasks of a two-parameter Poisson model: `python -m benchmarks.hundred_thousand [--help]`.

Prints processor seconds and memory of the amortized fit with the status of θ and of the posterior of all tasks, and how
far the shared means are from those of the marginal path (θ's normal, corrected), which is fitted afterwards.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import pyro
import pyro.distributions as dist

import bayesmeta as bm

SECONDS, GIBIBYTES, NEAR = 600, 4.0, 0.3


def rates(batch: bm.Batch) -> None:
    """A log rate and a slope a task."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            pyro.sample("y", dist.Poisson((phi[..., 0] + phi[..., 1] * batch.x[..., 0]).exp()), obs=batch.y)


def simulate(count: int, seed: int) -> bm.Tasks:
    """Tasks of 3 to 8 rows."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 9, count)
    phi = np.array([0.5, -0.2]) + np.array([0.6, 0.4]) * rng.normal(size=(count, 2))
    x = [rng.uniform(-1, 1, (n, 1)) for n in sizes]
    y = [rng.poisson(np.exp(a + b * rows[:, 0])).astype(float) for (a, b), rows in zip(phi, x, strict=True)]
    return bm.Tasks.from_arrays(x, y)


def peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Fits, infers all tasks and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--draws", type=int, default=200)
    options = parser.parse_args()
    tasks = simulate(options.tasks, 0)
    start = time.process_time()
    fit = bm.fit(rates, tasks, progress=False)
    fitted = time.process_time()
    print(f"{options.tasks} tasks, {len(tasks.y)} rows: fit {fitted - start:.0f} CPU s, peak {peak():.2f} GiB")
    print(f"  theta {fit.shared.status}, ESS {fit.shared.ess:.3f}, k-hat {fit.shared.khat:.2f}", flush=True)
    post = fit.posterior(tasks, draws=options.draws)
    total, memory, flagged = time.process_time() - start, peak(), float((post.flag != "").mean())
    print(f"  posterior with {options.draws} draws: {total - fitted + start:.0f} CPU s, {flagged:.2%} flagged")
    print(f"  in all {total:.0f} CPU s (bar {SECONDS}){'' if total <= SECONDS else '   MISSED'}")
    print(f"  peak {memory:.2f} GiB (bar {GIBIBYTES}){'' if memory <= GIBIBYTES else '   MISSED'}", flush=True)
    del post
    start = time.process_time()
    other = bm.fit(rates, tasks, method=bm.Marginal(shared="normal"), progress=False)
    print(
        f"  marginal: {time.process_time() - start:.0f} CPU s, theta {other.shared.status}, ESS {other.shared.ess:.3f}"
    )
    gap = max(
        float(np.abs((fit.shared.mean(name) - other.shared.mean(name)) / other.shared.sd(name)).max())
        for name in ("mu", "tau")
    )
    fine = gap <= NEAR or fit.shared.status == "uncorrected"
    print(f"  shared means apart {gap:.3f} sd (bar {NEAR}, or uncorrected){'' if fine else '   MISSED'}")


if __name__ == "__main__":
    main()
