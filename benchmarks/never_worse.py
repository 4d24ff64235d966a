"""Is sharing ever worse? `python -m benchmarks.never_worse [--cells radon identical …]`.

For each cell the held-out log score of the robust prior minus that of the better of no pooling and complete pooling,
paired by row. Cells: tasks that are identical, in between and unrelated (generated), the radon counties that ship, and
School and Parkinsons, which do not, each at three sizes. The robust prior is chosen on inner folds and scored on outer
ones. The units of School and Parkinsons, a location and a scale for all tasks and candidates, are those of all rows,
held-out ones too.
"""

from __future__ import annotations

import argparse
import importlib.resources
import time
from pathlib import Path

import numpy as np
import pandas as pd

import bayesmeta as bm
from bayesmeta.checks.folds import COMPLETE_POOLING, NO_POOLING, ROBUST
from benchmarks.grouped_linear import DATA, parkinsons, school

SPREADS = {"identical": 0.0, "between": 0.5, "unrelated": 5.0}
SIZES = {
    "identical": (5, 10, 20),
    "between": (5, 10, 20),
    "unrelated": (5, 10, 20),
    "radon": (15, 40, 85),
    "school": (5, 10, 20),
    "parkinsons": (5, 10, 20),
}
READ = {"school": school, "parkinsons": parkinsons}
RECORDINGS = 20
"""Of each patient, at random: pupils of a school are taken all."""
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


def grouped(cell: str, count: int, seed: int, folder: Path) -> bm.Tasks:
    """Some of the schools, or some recordings of some patients, without the inputs that are constant there."""
    generator = np.random.default_rng(seed)
    groups = READ[cell](folder)
    chosen = [groups[i] for i in generator.permutation(len(groups))[:count]]
    if cell == "parkinsons":
        chosen = [group.rows(generator.permutation(len(group.y))[:RECORDINGS]) for group in chosen]
    varying = np.concatenate([group.x for group in chosen]).std(0) > 0
    names = [f"{cell} {i}" for i in range(count)]
    return bm.Tasks.from_arrays([group.x[:, varying] for group in chosen], [group.y for group in chosen], names=names)


def tasks_of(cell: str, count: int, seed: int, folder: Path) -> bm.Tasks:
    """The tasks of a cell."""
    if cell in SPREADS:
        return generated(SPREADS[cell], count, seed)
    return radon(count, seed) if cell == "radon" else grouped(cell, count, seed, folder)


def run(cell: str, tasks: bm.Tasks, folds: int, seed: int) -> tuple[float, float]:
    """The difference of a cell and its standard error; prints the table."""
    units = tasks if cell in READ else None
    model = bm.models.multitask(features=tasks.x.shape[1], standardize=units)
    start = time.perf_counter()
    method = bm.Marginal(shared="normal", chains=2, draws=250)
    scores = bm.compare_sharing(
        model, tasks, folds=folds, context=None, robust=True, method=method, draws=500, seed=seed
    )
    better = max(NO_POOLING, COMPLETE_POOLING, key=lambda name: scores.total(name)[0])
    mean, error = scores.total(ROBUST, over=better)
    print(f"{cell}, {len(tasks)} tasks, seed {seed}, {folds} folds, {time.perf_counter() - start:.0f} s")
    print(f"weights {scores.weights}\n{scores.table()}")
    print(f"  robust minus {better}: {mean:+.4f} ± {error:.4f} nats a row\n", flush=True)
    return mean, error


def main() -> None:
    """Prints every cell and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, choices=range(3), default=range(3), help="which of the sizes")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    found = []
    for cell in options.cells:
        if cell in READ and not options.data.is_dir():
            print(f"skipped {cell}: {options.data} is not there; give --data a folder with school/ and parkinsons/")
            continue
        for size in options.sizes:
            tasks = tasks_of(cell, SIZES[cell][size], options.seed, options.data)
            found.append(run(cell, tasks, options.folds, options.seed))
    means, errors = (np.array(values) for values in zip(*found, strict=True))
    print(
        f"{len(found)} cells: mean difference {means.mean():+.4f}; worse by more than 3 standard errors in "
        f"{int((means < -3 * errors).sum())}; strictly better in {int((means > 0).sum())}"
    )


if __name__ == "__main__":
    main()
