"""Active choice of the next example: which dose to give next, to learn a new patient's response from few trials.

A patient responds to a dose with a probability that rises around a threshold of the patient's own. The likelihood is
the user's, the prior is learned from earlier patients. For a new patient each next dose is the one whose outcome is
expected to tell most about the threshold: the mutual information of outcome and parameters, H(E p) - E H(p) over
draws of the posterior (Houlsby et al. 2011, https://arxiv.org/abs/1112.5745). Doses in random order learn slower.
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm

DOSES = np.linspace(-3.0, 3.0, 13)
"""Logarithms of doses."""


def response(batch: bm.Batch) -> None:
    """Thresholds differ between patients; all curves are equally steep."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    slope = pyro.sample("slope", dist.LogNormal(0.5, 0.5))
    with batch.tasks():
        threshold = pyro.sample("threshold", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Bernoulli(logits=slope * (batch.x[..., 0] - threshold)), obs=batch.y)


def patients(count: int, doses: int, generator: np.random.Generator) -> tuple[bm.Tasks, np.ndarray]:
    """Earlier patients at random doses, and their true thresholds."""
    threshold = generator.normal(0.3, 1.2, count)
    x = generator.choice(DOSES, (count, doses, 1))
    chance = 1 / (1 + np.exp(-3 * (x[..., 0] - threshold[:, None])))
    y = (generator.random(chance.shape) < chance).astype(float)
    return bm.Tasks.from_arrays(list(x), list(y), names=[f"patient {i}" for i in range(count)]), threshold


def information(post: bm.Posterior) -> np.ndarray:
    """What the outcome at each dose is expected to tell of the parameters, in nats, `(task, dose)`."""
    chance = post.predict(DOSES[:, None], kind="mean").draws
    entropy = torch.special.entr

    def binary(p: np.ndarray) -> np.ndarray:
        values = torch.as_tensor(p)
        return np.asarray(entropy(values) + entropy(1 - values))

    return binary(chance.mean(0)) - binary(chance).mean(0)


def study(fit: bm.Fit, threshold: np.ndarray, trials: int, *, active: bool, seed: int) -> np.ndarray:
    """Gives new patients doses one by one; returns the RMSE of their thresholds after each, `(trials,)`."""
    generator = np.random.default_rng(seed)
    count, names = len(threshold), [f"new {i}" for i in range(len(threshold))]
    x, y, errors = np.zeros((count, 0, 1)), np.zeros((count, 0)), []
    for _ in range(trials):
        if active:
            post = fit.posterior(bm.Tasks.from_arrays(list(x), list(y), names=names), draws=300)
            dose = DOSES[information(post).argmax(1)]
        else:
            dose = generator.choice(DOSES, count)
        chance = 1 / (1 + np.exp(-3 * (dose - threshold)))
        x = np.concatenate([x, dose[:, None, None]], 1)
        y = np.concatenate([y, (generator.random(count) < chance)[:, None].astype(float)], 1)
        post = fit.posterior(bm.Tasks.from_arrays(list(x), list(y), names=names), draws=300)
        errors.append(float(np.sqrt(np.mean((post.mean("threshold") - threshold) ** 2))))
    return np.array(errors)


def main(
    *, count: int = 200, new: int = 60, trials: int = 6, steps: int = 800, progress: bool = True
) -> dict[str, float]:
    """Fits, studies new patients in both ways, and returns the RMSE of thresholds at the end.

    Args:
        count: Earlier patients.
        new: New ones.
        trials: Doses given to each new patient.
        steps: Training steps.
        progress: Whether to show a bar.
    """
    generator = np.random.default_rng(0)
    earlier, _ = patients(count, 8, generator)
    method = bm.Amortized(optimizer=bm.Optimizer(steps=steps))
    fit = bm.fit(response, earlier, method=method, progress=progress)
    threshold = generator.normal(0.3, 1.2, new)
    chosen = study(fit, threshold, trials, active=True, seed=1)
    random = study(fit, threshold, trials, active=False, seed=1)
    for k, pair in enumerate(zip(chosen, random, strict=True), 1):
        print(f"after {k} doses: RMSE of thresholds {pair[0]:.2f} chosen, {pair[1]:.2f} at random")
    return {"chosen": float(chosen[-1]), "random": float(random[-1]), "before": float(threshold.std())}


if __name__ == "__main__":
    main()
