"""Three kinds of outcome over the same inputs, many of them missing: a level, a yes or no, a count, in every clinic.

A trial's treatment acts on a pain score, on recovery and on the number of visits; each clinic measured what it could.
One prior over the clinics' effects, one fit for all three kinds. The truth is known.
"""

from __future__ import annotations

import numpy as np

import bayesmeta as bm

EFFECT = np.array([-1.0, 0.8, -0.4])
BASE = np.array([0.2, -0.5, 0.7])
SPREAD = 0.5
OUTCOMES = ("pain", "recovered", "visits")


def clinics(count: int, seed: int) -> tuple[bm.Tasks, np.ndarray]:
    """Clinics with 6 to 30 patients, a third of the outcomes missing, and the true effects `(clinic, 3)`."""
    generator = np.random.default_rng(seed)
    effect = EFFECT + SPREAD * generator.normal(size=(count, 3))
    sizes = generator.integers(6, 31, count)
    x, y = [], []
    for size, own in zip(sizes, effect, strict=True):
        treated = generator.integers(0, 2, size)
        f = BASE + treated[:, None] * own
        pain = f[:, 0] + 0.8 * generator.normal(size=size)
        recovered = (generator.random(size) < 1 / (1 + np.exp(-f[:, 1]))).astype(float)
        labels = np.column_stack([pain, recovered, generator.poisson(np.exp(f[:, 2]))])
        labels[generator.random(labels.shape) < 1 / 3] = np.nan
        x.append(treated[:, None].astype(float))
        y.append(labels)
    names = [f"clinic {seed}-{i}" for i in range(count)]
    return bm.Tasks.from_arrays(x, y, names=names, missing="mask"), effect


def main(*, count: int = 40, steps: int | None = None, progress: bool = True) -> dict[str, float]:
    """Fits all outcomes together; returns how often true effects lie in their 90 % intervals, and errors.

    Args:
        count: Clinics.
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    tasks, truth = clinics(count, seed=1)
    kinds = {0: bm.likelihoods.Normal(), 1: bm.likelihoods.Bernoulli(), 2: bm.likelihoods.Poisson()}
    model = bm.models.multitask(
        features=1, sharing=bm.models.sharing.Gaussian(by="coordinate"), likelihood=bm.likelihoods.Outputs(kinds)
    )
    print(model)
    fit = bm.fit(model, tasks, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    post = fit.posterior(tasks)
    low, middle, high = post.quantile("phi", [0.05, 0.5, 0.95])[..., :3]
    found = {
        "inside": float(((truth > low) & (truth < high)).mean()),
        "error": float(np.abs(middle - truth).mean()),
        "error of the mean": float(np.abs(EFFECT - truth).mean()),
        "flagged": float((post.flag != "").sum()),
    }
    print(f"true effects within their 90 % interval: {found['inside']:.1%}")
    print(f"mean error of an effect: {found['error']:.3f}; with the average for all: {found['error of the mean']:.3f}")
    treated = np.array([[1.0]])
    for k, name in enumerate(OUTCOMES):
        drawn = post.predict(treated, site=f"y{k}", kind="mean").mean[:3, 0]
        print(f"{name:>10} of treated patients in the first clinics: {np.round(drawn, 2)}")
    return found


if __name__ == "__main__":
    main()
