"""Linear priors on grouped data: `python -m benchmarks.grouped_linear [--help]`; needs data that are not shipped.

School: exam scores of pupils in 139 schools, 75 % of each school's pupils to learn from and the others to predict, and
39 unseen schools of which 0 to 20 pupils are known. Parkinsons: total_UPDRS of 42 patients, 10, 20 or 75 recordings of
each to learn from. The hierarchy is `linear_em.py`, beside one fit of all tasks and one of each task alone (ridge, its
strength by leaving one row out).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from benchmarks.linear_em import LinearHierarchy

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = (10, 20, 75)
CONTEXTS = (0, 5, 10, 20)
UNSEEN = 39
INTERVAL = 0.9
STRENGTHS = np.geomspace(1e-3, 1e5, 33)
"""Strengths of ridge that are tried."""


@dataclass(frozen=True)
class Task:
    """Inputs `(n, d)` with a constant, and labels `(n,)`."""

    x: np.ndarray
    y: np.ndarray

    def rows(self, index: np.ndarray) -> Task:
        """Some of the rows."""
        return Task(self.x[index], self.y[index])


@dataclass(frozen=True)
class Score:
    """Of predicted rows: explained variance, root mean squared error, mean log score (nats a row), coverage of 90 %."""

    explained: float
    rmse: float
    log_score: float
    coverage: float

    @classmethod
    def of(cls, y: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> Score:
        """Scores normal predictions."""
        sd = np.sqrt(variance)
        inside = np.abs(y - mean) <= norm.ppf(0.5 + INTERVAL / 2) * sd
        squared = (y - mean) ** 2
        return cls(
            float(1 - squared.mean() / y.var()),
            float(np.sqrt(squared.mean())),
            float(norm.logpdf(y, mean, sd).mean()),
            float(inside.mean()),
        )


def school(folder: Path) -> list[Task]:
    """The schools; inputs standardised."""
    data = np.load(folder / "school" / "school.npz")
    return _tasks(data["X"][:, :-1], data["y"], data["task"])


def parkinsons(folder: Path) -> list[Task]:
    """The patients, with the time of the recording."""
    table = pd.read_csv(folder / "parkinsons" / "parkinsons_updrs.csv.gz")
    inputs = table.drop(columns=["subject#", "age", "sex", "motor_UPDRS", "total_UPDRS"])
    return _tasks(inputs.to_numpy(), table["total_UPDRS"].to_numpy(), table["subject#"].to_numpy())


def _tasks(x: np.ndarray, y: np.ndarray, task: np.ndarray) -> list[Task]:
    x, y = x.astype(float), y.astype(float)
    spread = x.std(0)
    x = np.column_stack([(x - x.mean(0)) / np.where(spread > 0, spread, 1.0), np.ones(len(x))])
    return [Task(x[task == name], y[task == name]) for name in np.unique(task)]


def splits(tasks: Sequence[Task], sizes: Sequence[int], seed: int) -> Iterator[tuple[Task, Task]]:
    """Rows to learn from, `sizes` of them, and the others, of each task."""
    rng = np.random.default_rng(seed)
    for task, size in zip(tasks, sizes, strict=True):
        order = rng.permutation(len(task.y))
        yield task.rows(order[:size]), task.rows(order[size:])


def ridge(task: Task) -> tuple[np.ndarray, float]:
    """Coefficients by ridge, the constant free, and the variance of a new row; both judged by leaving one row out."""
    x, centre, offset = task.x[:, :-1], task.x[:, :-1].mean(0), task.y.mean()
    left, values, right = np.linalg.svd(x - centre, full_matrices=False)
    projected = left.T @ (task.y - offset)
    keep = values**2 / (values**2 + STRENGTHS[:, None])
    residuals = task.y - offset - (keep * projected) @ left.T
    leverage = keep @ (left**2).T + 1 / len(task.y)
    left_out = (residuals / np.maximum(1 - leverage, 1e-6)) ** 2
    best = int(left_out.mean(1).argmin())
    slope = right.T @ (keep[best] * projected / np.maximum(values, 1e-12))
    return np.append(slope, offset - centre @ slope), max(float(left_out[best].mean()), 1e-6)


def compare(given: Sequence[Task], held_out: Sequence[Task]) -> dict[str, Score]:
    """The three ways of sharing, on the held-out rows of the tasks that were learned from."""
    prior = LinearHierarchy.learn([task.x for task in given], [task.y for task in given])
    pooled = ridge(Task(np.concatenate([t.x for t in given]), np.concatenate([t.y for t in given])))
    alone = [ridge(task) for task in given]
    y = np.concatenate([task.y for task in held_out])

    def normal(fits: Sequence[tuple[np.ndarray, float]]) -> Score:
        mean = np.concatenate([task.x @ slope for task, (slope, _) in zip(held_out, fits, strict=True)])
        variance = np.concatenate([np.full(len(t.y), v) for t, (_, v) in zip(held_out, fits, strict=True)])
        return Score.of(y, mean, variance)

    return {
        "hierarchy": predicted(prior, given, held_out),
        "complete pooling": normal([pooled] * len(given)),
        "no pooling": normal(alone),
    }


def predicted(prior: LinearHierarchy, given: Sequence[Task], held_out: Sequence[Task]) -> Score:
    """Scores what a learned prior predicts of held-out rows, given some of each task."""
    found = [prior.predict(a.x, a.y, b.x) for a, b in zip(given, held_out, strict=True)]
    mean, variance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Score.of(np.concatenate([task.y for task in held_out]), mean, variance)


def unseen(tasks: Sequence[Task], seed: int) -> dict[str, Score]:
    """Schools that the prior was not learned from, with some of their pupils known."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tasks))
    known, new = ([tasks[i] for i in part] for part in (order[UNSEEN:], order[:UNSEEN]))
    prior = LinearHierarchy.learn([task.x for task in known], [task.y for task in known])
    most = max(CONTEXTS)
    cut = list(splits(new, [most] * len(new), seed))
    return {
        f"{count} pupils": predicted(prior, [a.rows(np.arange(count)) for a, _ in cut], [b for _, b in cut])
        for count in CONTEXTS
    }


def report(title: str, scores: Sequence[dict[str, Score]]) -> None:
    """Prints means over splits, and standard deviations of the explained variance."""
    print(f"{title} ({len(scores)} splits)")
    for name in scores[0]:
        columns = np.array([[s.explained, s.rmse, s.log_score, s.coverage] for s in (one[name] for one in scores)])
        explained, rmse, log_score, coverage = columns.mean(0)
        print(
            f"  {name:18s} explained variance {explained:.3f} ± {columns[:, 0].std(ddof=1):.3f}, RMSE {rmse:.3f}, "
            f"log score {log_score:.4f}, 90 % intervals cover {coverage:.3f}"
        )


def main() -> None:
    """Prints the figures of both data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--splits", type=int, default=10)
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"skipped: {options.data} is not there; give --data a folder with school/ and parkinsons/")
        return
    seeds = range(options.splits)
    schools = school(options.data)
    sizes = [round(0.75 * len(task.y)) for task in schools]
    report("School, held-out pupils", [compare(*zip(*splits(schools, sizes, seed), strict=True)) for seed in seeds])
    report("School, unseen schools", [unseen(schools, seed) for seed in seeds])
    patients = parkinsons(options.data)
    for rows in ROWS:
        cut = [splits(patients, [rows] * len(patients), seed) for seed in seeds]
        report(f"Parkinsons, {rows} recordings a patient", [compare(*zip(*one, strict=True)) for one in cut])


if __name__ == "__main__":
    main()
