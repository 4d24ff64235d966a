"""Is sharing ever worse? `python -m benchmarks.never_worse [--cells radon identical …]`.

For each cell the held-out log score of the robust prior minus that of the better of no pooling and complete pooling,
paired by row. Cells: tasks that are identical, in between and unrelated (generated), the radon counties that ship, each
at three sizes. The robust prior is chosen on inner folds and scored on outer ones.
"""

from __future__ import annotations

import argparse
import importlib.resources
import time

import numpy as np
import pandas as pd

import bayesmeta as bm
from bayesmeta.checks.folds import COMPLETE_POOLING, NO_POOLING, ROBUST

SPREADS = {"identical": 0.0, "between": 0.5, "unrelated": 5.0}
SIZES = {"identical": (5, 10, 20), "between": (5, 10, 20), "unrelated": (5, 10, 20), "radon": (15, 40, 85)}
ROWS, INPUTS, NOISE = 10, 2, 0.5


def generated(spread: float, count: int, seed: int) -> bm.Tasks:
    """Lines in two inputs whose coefficients differ between tasks by `spread`."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, ROWS, INPUTS))
    weight = np.array([1.0, -1.0, 0.5]) + spread * generator.normal(size=(count, INPUTS + 1))
    mean = np.einsum("tnd,td->tn", x, weight[:, :INPUTS]) + weight[:, INPUTS:]
    names = [f"t{i}" for i in range(count)]
    return bm.Tasks.from_arrays(list(x), list(mean + NOISE * generator.normal(size=mean.shape)), names=names)


def radon(count: int, seed: int) -> bm.Tasks:
    """Some of the counties."""
    with importlib.resources.files("bayesmeta.data").joinpath("radon.csv").open() as file:
        homes = pd.read_csv(file)
    counties = np.random.default_rng(seed).permutation(homes["county"].unique())[:count]
    return bm.Tasks.from_dataframe(homes[homes["county"].isin(counties)], task="county", x="floor", y="log_radon")


def run(cell: str, count: int, folds: int, seed: int) -> tuple[float, float]:
    """The difference of a cell and its standard error; prints the table."""
    tasks = radon(count, seed) if cell == "radon" else generated(SPREADS[cell], count, seed)
    model = bm.models.multitask(features=tasks.x.shape[1])
    start = time.perf_counter()
    method = bm.Marginal(shared="normal", chains=2, draws=250)
    scores = bm.compare_sharing(
        model, tasks, folds=folds, context=None, robust=True, method=method, draws=500, seed=seed
    )
    better = max(NO_POOLING, COMPLETE_POOLING, key=lambda name: scores.total(name)[0])
    mean, error = scores.total(ROBUST, over=better)
    print(f"{cell}, {count} tasks, {time.perf_counter() - start:.0f} s; weights {scores.weights}\n{scores.table()}")
    print(f"  robust minus {better}: {mean:+.4f} ± {error:.4f} nats a row\n", flush=True)
    return mean, error


def main() -> None:
    """Prints every cell and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = [run(cell, count, options.folds, options.seed) for cell in options.cells for count in SIZES[cell]]
    means, errors = (np.array(values) for values in zip(*found, strict=True))
    print(
        f"{len(found)} cells: mean difference {means.mean():+.4f}; worse by more than 3 standard errors in "
        f"{int((means < -3 * errors).sum())}; strictly better in {int((means > 0).sum())}"
    )


if __name__ == "__main__":
    main()
