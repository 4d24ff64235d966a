"""The collection: models whose task posteriors are awkward, three easy ones for false alarms, and their tasks.

`awkward_known.py` and `awkward_shared.py` hold the Pyro functions; `awkward_densities.py` states the same models a
second time, in NumPy, for `references.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import bayesmeta as bm
from benchmarks import awkward_known as known
from benchmarks import awkward_shared as shared
from benchmarks.awkward_known import Random, Rows

SIZES = (1, 1, 2, 2, 3, 5, 10, 30)
COUNT = 40


@dataclass(frozen=True)
class Case:
    """A model and its tasks.

    Attributes:
        model: The Pyro function.
        task: Simulates one task of n rows: `{"y": (n,), "x": (n, dx), columns: (n,)}`.
        why: What is awkward.
        sizes: Numbers of rows that tasks have.
        easy: Whether it is one of the models that should never be flagged.
    """

    model: Callable[[bm.Batch], None]
    task: Callable[[Random, int], Rows]
    why: str
    sizes: tuple[int, ...] = SIZES
    easy: bool = False

    def tasks(self, *, count: int = COUNT, seed: int = 0) -> bm.Tasks:
        """The tasks of the collection; another seed gives new ones, with other names."""
        random = np.random.default_rng([seed, 7])
        rows = [self.task(random, self.sizes[i % len(self.sizes)]) for i in range(count)]
        extra = {k: [r[k] for r in rows] for k in rows[0] if k not in ("x", "y")}
        x = [r["x"] for r in rows] if "x" in rows[0] else None
        names = [f"{seed}.{i}" for i in range(count)]
        return bm.Tasks.from_arrays(x, [r["y"] for r in rows], columns=extra or None, names=names)


PLENTY = (20, 30, 40, 60)
CASES = {
    "heavy_tails": Case(known.heavy_tails, known.heavy_tails_task, "Student-t prior and likelihood in conflict"),
    "funnel": Case(known.funnel, known.funnel_task, "log sd and value of the same task"),
    "rare_positives": Case(shared.rare_positives, shared.rare_positives_task, "logistic, all-zero tasks, θ unknown"),
    "zero_counts": Case(shared.zero_counts, shared.zero_counts_task, "Poisson, all-zero tasks, θ unknown"),
    "edge_probability": Case(known.edge_probability, known.edge_probability_task, "probabilities at 0 and 1"),
    "small_noise": Case(known.small_noise, known.small_noise_task, "a noise sd near 0 for each task", (1, 2, 10, 30)),
    "phase": Case(known.phase, known.phase_task, "sinusoid: (a, shift) and (-a, shift + π)"),
    "square": Case(known.square, known.square_task, "φ and -φ"),
    "square_shared": Case(shared.square_shared, shared.square_shared_task, "φ and -φ, θ unknown"),
    "product": Case(known.product, known.product_task, "(a, b) and (-a, -b), hyperbolas"),
    "mirror": Case(known.mirror, known.mirror_task, "two modes in 6 dimensions", sizes=(6, 12, 30)),
    "labels": Case(known.labels, known.labels_task, "two components that may change places"),
    "one_example": Case(known.one_example, known.one_example_task, "one count, wide prior", sizes=(1,)),
    "twenty": Case(known.twenty, known.twenty_task, "20 parameters, 2 heavy-tailed rows", sizes=(2,)),
    "sparse": Case(known.sparse, known.sparse_task, "20 parameters with Laplace priors, 2 rows", sizes=(2,)),
    "laplace_prior": Case(known.laplace_prior, known.laplace_prior_task, "kinks of the prior"),
    "mixture_prior": Case(known.mixture_prior, known.mixture_prior_task, "two components, 16 sds apart"),
    "outliers": Case(known.outliers, known.outliers_task, "a row is an outlier or not", sizes=(1, 2, 3, 3, 4, 5)),
    "rectified": Case(known.rectified, known.rectified_task, "kinks of the likelihood"),
    "change_point": Case(known.change_point, known.change_point_task, "jumps of the likelihood"),
    "overdispersed": Case(known.overdispersed, known.overdispersed_task, "counts with a concentration for each task"),
    "censored": Case(known.censored, known.censored_task, "tasks with nothing but censored rows"),
    "outlier_tasks": Case(shared.outlier_tasks, shared.outlier_tasks_task, "heavy tails, θ unknown"),
    "easy_normal": Case(shared.easy_normal, shared.easy_normal_task, "Gaussian, θ unknown", easy=True),
    "easy_logistic": Case(shared.easy_logistic, shared.easy_logistic_task, "plenty of binary rows", PLENTY, True),
    "easy_poisson": Case(shared.easy_poisson, shared.easy_poisson_task, "plenty of counts, θ unknown", PLENTY, True),
}
