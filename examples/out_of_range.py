"""Inputs that nobody has measured: which posteriors widen there?

Two hierarchical models learn from tasks measured in [-2, 2]. New tasks are given a few rows there and asked for labels
in the same range and beside it. Inside both are right. Outside, the Gaussian process with a learned kernel knows that
it does not know; a Bayesian last layer on learned features is as sure of itself as its features happen to be flat.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import numpy as np

import bayesmeta as bm
from bayesmeta.models import alpaca, hierarchical_gp

LEVEL = 0.9


def intervals(draws: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Share of labels in their intervals, and mean width, of draws `(draw, task, M)`; padding is NaN."""
    lower, upper = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    real = np.isfinite(y)
    return float(((lower < y) & (y < upper))[real].mean()), float((upper - lower)[real].mean())


def picture(learners: dict[str, bm.Fit], context: bm.Tasks, path: pathlib.Path) -> None:
    """What both say about the first new task from -6 to 6."""
    import matplotlib.pyplot as plt

    x = np.linspace(-6, 6, 241)
    figure, axes = plt.subplots(len(learners), sharex=True, sharey=True, figsize=(7, 6), layout="constrained")
    for axis, (name, fit) in zip(axes, learners.items(), strict=True):
        drawn = fit.posterior(context[:1]).predict(x[:, None]).draws[:, 0]
        lower, middle, upper = np.quantile(drawn, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2], axis=0)
        axis.axvspan(-2, 2, color="0.93", label="range of the training tasks")
        axis.fill_between(x, lower, upper, alpha=0.3, label="90 % interval of a new label")
        axis.plot(x, middle, label="median")
        axis.plot(context[:1].x[:, 0], context[:1].y, "ko", markersize=4, label="known rows")
        axis.set(title=name, ylabel="y")
    axes[-1].set_xlabel("x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main(
    *,
    known: int = 60,
    read: int = 4000,
    new: int = 200,
    steps: int | None = 3000,
    out: pathlib.Path | None = None,
    progress: bool = True,
) -> dict[str, tuple[float, float]]:
    """Fits both, and returns coverage and mean width of 90 % intervals, inside and outside the range.

    Args:
        known: Tasks that the Gaussian process learns from.
        read: Tasks that the features of the last layer are learned from, no fewer.
        new: Tasks to predict.
        steps: Training steps of the features; None stops by itself.
        out: Folder of the picture; None draws none.
        progress: Whether to show bars.
    """
    inside = bm.families.GaussianProcesses(length=0.8, scale=1.0, noise=0.1, context_rows=(5, 20), target_rows=25)
    outside = dataclasses.replace(inside, target_interval=(2.0, 6.0))
    tasks, _ = inside.simulate(read, rows=30, seed=0)
    exact = bm.Amortized(shared="map", guide=bm.guides.Exact(), optimizer=bm.Optimizer(steps=steps, batch_tasks=32))
    models = {
        "Gaussian process": (hierarchical_gp.build(hyper="shared"), tasks[:known], bm.Marginal(shared="map")),
        "Bayesian last layer": (alpaca.build(features=16), tasks, exact),
    }
    learners = {
        name: bm.fit(model, some, method=method, progress=progress) for name, (model, some, method) in models.items()
    }
    found = {}
    for place, family in (("inside", inside), ("outside", outside)):
        context, target = family.episodes(new, seed=1)
        y = target.batch(slice(None)).y.numpy()
        y = np.where(target.batch(slice(None)).mask.numpy(), y, np.nan)
        for name, fit in learners.items():
            covered, width = found[f"{name}, {place}"] = intervals(
                fit.posterior(context, draws=400).predict(target).draws, y
            )
            print(f"{place:8s} {name:20s} {covered:6.1%} within 90 % intervals, {width:.2f} wide")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        picture(learners, inside.episodes(new, seed=1)[0], out / "out_of_range.png")
        print(f"wrote {out / 'out_of_range.png'}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    main(out=parser.parse_args().out)
