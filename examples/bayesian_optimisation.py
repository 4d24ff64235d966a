"""Bayesian optimisation with a learned prior: where to measure next, when similar functions were measured before.

Twenty functions of two inputs were measured at twenty places each; they have two bumps in common. A new function is to
be maximised in a few measurements: each is made where the expected improvement over the best one so far is largest.
The learned prior knows good places before the first measurement, and its posterior finds better ones.
"""

from __future__ import annotations

import numpy as np

import bayesmeta as bm


def expected_improvement(prediction: bm.ConditionalPrediction, best: np.ndarray) -> np.ndarray:
    """E max(y - best, 0) at every candidate `(task, M)`; before the first measurement the mean."""
    if not np.isfinite(best).all():
        return prediction.mean
    return np.maximum(prediction.draws - best[:, None], 0).mean(0)


def measured(functions: bm.Tasks, chosen: list[list[int]]) -> bm.Tasks:
    """The rows of each function that have been measured so far."""
    parts = [functions[i : i + 1] for i in range(len(functions))]
    x = [part.x.numpy()[rows] for part, rows in zip(parts, chosen, strict=True)]
    y = [part.y.numpy()[rows] for part, rows in zip(parts, chosen, strict=True)]
    return bm.Tasks.from_arrays(x, y, names=functions.names)


def main(*, known: int = 20, new: int = 30, places: int = 100, budget: int = 8, draws: int = 400) -> dict[str, float]:
    """Maximises new functions, and returns mean regrets: what is lost against the best of all places.

    Args:
        known: Functions to learn from.
        new: Functions to maximise.
        places: Where each may be measured.
        budget: Measurements of each.
        draws: Draws of each prediction.
    """
    family = bm.families.Cauchy(scale=0.6, length=1.0)
    history, _ = family.simulate(known, rows=20, seed=0)
    fit = bm.fit(bm.models.shared_process.build(history, kernel="rbf"), history, progress=False)
    functions, truth = family.simulate(new, rows=places, seed=1)
    value, inputs = truth["function"], functions.x.reshape(new, places, 2).numpy()
    labels = functions.y.reshape(new, places).numpy()
    chosen: list[list[int]] = [[] for _ in range(new)]
    best = np.full(new, -np.inf)
    for step in range(budget):
        prediction = fit.predict(measured(functions, chosen), list(inputs), draws=draws, seed=step)
        score = expected_improvement(prediction, best)
        for i, rows in enumerate(chosen):
            score[i, rows] = -np.inf
            rows.append(int(score[i].argmax()))
        best = np.maximum(best, labels[np.arange(new), [rows[-1] for rows in chosen]])
        lost = value.max(1) - np.array([value[i, rows].max() for i, rows in enumerate(chosen)])
        print(f"after {step + 1} measurements: mean regret {lost.mean():.3f}")
    random = np.random.default_rng(0).permuted(np.tile(np.arange(places), (new, 1)), axis=1)[:, :budget]
    first = value[np.arange(new), [rows[0] for rows in chosen]]
    found = {
        "learned prior": float(lost.mean()),
        "its first guess alone": float((value.max(1) - first).mean()),
        "random places": float((value.max(1) - np.take_along_axis(value, random, 1).max(1)).mean()),
    }
    print(found)
    return found


if __name__ == "__main__":
    main()
