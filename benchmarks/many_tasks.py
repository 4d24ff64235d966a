"""10,000 new tasks of the radon model: time and memory of their posteriors. `python -m benchmarks.many_tasks`."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import numpy as np

import bayesmeta as bm
from benchmarks.exact_posteriors import counties, slopes
from benchmarks.new_tasks import simulate

TASKS = 10_000


def timed(label: str, run: Callable[[], object]) -> None:
    """Prints wall and CPU seconds of a call and the peak memory of the process so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {label:60s} {wall:6.2f} s wall {cpu:6.2f} s CPU, peak {peak:5.2f} GiB")


def moments(fit: bm.Fit, tasks: bm.Tasks, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and sds of all tasks."""
    post = fit.posterior(tasks, **options)
    return post.mean("phi"), post.sd("phi")


def main() -> None:
    """Fits radon, simulates 10,000 counties and times their posteriors."""
    fit = bm.fit(slopes, counties(), progress=False, method=bm.Amortized(optimizer=bm.Optimizer(steps=1500)))
    theta = {name: fit.shared.mean(name) for name in ("mu", "tau", "sigma_y")}
    sizes = np.random.default_rng(0).integers(1, 12, TASKS).tolist()
    tasks = simulate(theta, sizes, share=0.2, seed=0)
    print(f"{TASKS} tasks, {sum(sizes)} rows")
    small = tasks[:300]
    for refine, draws in (("none", 64), ("auto", 1000)):
        moments(fit, small, refine=refine, draws=draws)
    timed("means and sds, unchecked (64 draws)", lambda: moments(fit, tasks, refine="none", draws=64))
    timed("1,000 draws each with PSIS", lambda: fit.posterior(tasks, draws=1000))
    timed("1,000 draws each with PSIS, with means and sds", lambda: moments(fit, tasks, draws=1000))


if __name__ == "__main__":
    main()
