"""Time of the density and its gradient, compiled: `python -m benchmarks.density_speed [--rounds 300]`.

256 tasks with 16 rows and 4 parameters, linear regression, one θ. Running the Pyro model eagerly with autograd, as
Pyro's own inference does, against the graph that the engine records, run as it is and compiled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pyro.poutine as poutine
import torch

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from benchmarks.step_time import TASKS, regression, simulated, timed

BAR = 8.0


def eager_gradient(batch: bm.Batch, values: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Log joint of the model at given values and its gradient, by Pyro."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    conditioned = poutine.condition(regression, data=leaves)

    def call() -> None:
        total = poutine.trace(conditioned).get_trace(batch).log_prob_sum()
        torch.autograd.grad(total, list(leaves.values()))

    return call


def compare(dtype: torch.dtype, rounds: int) -> None:
    """Prints times, ratios and what compilation costs."""
    torch.manual_seed(0)
    tasks = simulated()
    density = TaskDensity(regression, tasks, dtype=dtype)
    batch = tasks.batch(range(TASKS))
    data = density.tensors(batch)
    theta = 0.1 * torch.randn(density.structure.shared_size, dtype=dtype)
    noise = torch.randn(TASKS, density.structure.task_size, dtype=dtype)
    values = density.shared_values(theta) | {"beta": density.constrain(theta, noise, data, {})["beta"].unsqueeze(1)}
    values = {name: value.detach() for name, value in values.items()}

    def recorded(compiled: bool) -> Callable[[], None]:
        start = time.perf_counter()
        density.log_joint.gradient(theta, noise, data, {}, weights=(1.0, 1.0), compiled=compiled)
        print(f"  {'compiling' if compiled else 'recording'} took {time.perf_counter() - start:.1f} s")
        return lambda: (
            density.log_joint.gradient(theta, noise, data, {}, weights=(1.0, 1.0), compiled=compiled) and None
        )

    print(dtype)
    calls = {"Pyro, eagerly": eager_gradient(batch.replace(data), values)}
    calls |= {"recorded": recorded(False), "recorded and compiled": recorded(True)}
    took = timed(calls, rounds)
    for name, value in took.items():
        print(f"  {name:22s} {1e3 * value:7.1f} µs, {took['Pyro, eagerly'] / value:5.1f} × eager")
    ratio = took["Pyro, eagerly"] / took["recorded and compiled"]
    print(f"  compiled: {ratio:.1f} × faster (bar {BAR})")


def main() -> None:
    """Compares in float32 and float64."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        compare(dtype, options.rounds)


if __name__ == "__main__":
    main()
