"""New tasks against their exact conditional posterior at one θ: `python -m benchmarks.new_tasks [--draws 20000]`.

Tasks of 0, 1, 5, 30 and 200 rows are simulated from the fitted radon model (Gaussian and logistic); the posterior at
that θ is known in closed form (Gaussian) or by quadrature (logistic).
"""

from __future__ import annotations

import argparse

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm
from benchmarks.exact_posteriors import counties, slopes

SIZES = (0, 1, 5, 30, 200)
GRID = 401


def logistic(batch: bm.Batch) -> None:
    """The radon model of a high reading: intercept and slope of a county on the log-odds scale."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            logits = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=batch.y)


def simulate(theta: dict[str, np.ndarray], sizes: list[int], share: float, seed: int) -> bm.Tasks:
    """Tasks from the model at one θ; a share of homes is measured on the first floor."""
    generator = np.random.default_rng(seed)
    xs, ys = [], []
    for size in sizes:
        phi = theta["mu"] + theta["tau"] * generator.standard_normal(2)
        x = (generator.random((size, 1)) < share).astype(float)
        mean = phi[0] + phi[1] * x[:, 0]
        if "sigma_y" in theta:
            ys.append(mean + theta["sigma_y"] * generator.standard_normal(size))
        else:
            ys.append((generator.random(size) < 1 / (1 + np.exp(-mean))).astype(float))
        xs.append(x)
    names = [f"new {i}" for i in range(len(sizes))]
    return bm.Tasks.from_arrays(xs, ys, names=names)


def exact_normal(task: bm.Tasks, theta: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of the conjugate posterior of intercept and slope."""
    design = np.column_stack([np.ones(len(task.x)), task.x.numpy().reshape(-1, 1)])
    precision = design.T @ design / theta["sigma_y"] ** 2 + np.diag(theta["tau"] ** -2.0)
    covariance = np.linalg.inv(precision)
    mean = covariance @ (design.T @ task.y.numpy() / theta["sigma_y"] ** 2 + theta["mu"] * theta["tau"] ** -2.0)
    return mean, np.sqrt(np.diag(covariance))


def exact_logistic(task: bm.Tasks, theta: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd by quadrature on a grid over ± 7 prior sds."""
    z = np.linspace(-7, 7, GRID)
    a, b = theta["mu"][0] + theta["tau"][0] * z[:, None], theta["mu"][1] + theta["tau"][1] * z[None, :]
    log_density = -0.5 * (z[:, None] ** 2 + z[None, :] ** 2)
    for x, y in zip(task.x.numpy().reshape(-1), task.y.numpy(), strict=True):
        log_density = log_density - np.logaddexp(0, -(2 * y - 1) * (a + b * x))
    weight = np.exp(log_density - log_density.max())
    weight /= weight.sum()
    grids = np.broadcast_arrays(a, b)
    mean = np.array([(weight * g).sum() for g in grids])
    return mean, np.sqrt([(weight * (g - m) ** 2).sum() for g, m in zip(grids, mean, strict=True)])


def report(name: str, fit: bm.Fit, theta: dict[str, np.ndarray], exact: object, draws: int, refine: str) -> list[str]:
    """One line a size: errors in exact sds, sd ratios, flags."""
    lines = []
    for size in SIZES:
        count = 60
        tasks = simulate(theta, [size] * count + [1], share=0.2, seed=size)[:count]
        post = fit.posterior(tasks, shared=theta, draws=draws, refine=refine)
        truth = [exact(task, theta) for task in tasks]
        mean, sd = (np.stack([t[k] for t in truth]) for k in (0, 1))
        error, ratio = (post.mean("phi") - mean) / sd, post.sd("phi") / sd
        accepted = post.flag == ""
        rms = np.sqrt((error**2).mean())
        methods = "/".join(sorted(set(post.method)))
        rms_accepted = np.sqrt((error[accepted] ** 2).mean()) if accepted.any() else float("nan")
        lines.append(
            f"  {name:9s} {refine:5s} rows {size:4d}: rms error {rms:6.3f} (accepted {rms_accepted:6.3f}), sd ratios "
            f"{ratio.min():5.2f}–{ratio.max():5.2f}, flagged {(~accepted).sum():3d} of {count} ({methods})"
        )
    return lines


def main() -> None:
    """Fits both models and prints every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = counties()
    fit = bm.fit(slopes, tasks, progress=False)
    theta = {name: fit.shared.mean(name) for name in ("mu", "tau", "sigma_y")}
    high = tasks.with_labels((tasks.y > 1.4).to(torch.int64), names=tasks.names)
    fit_logistic = bm.fit(logistic, high, progress=False)
    theta_logistic = {name: fit_logistic.shared.mean(name) for name in ("mu", "tau")}
    for refine in ("auto", "none"):
        print("\n".join(report("normal", fit, theta, exact_normal, options.draws, refine)))
        print("\n".join(report("logistic", fit_logistic, theta_logistic, exact_logistic, options.draws, refine)))


if __name__ == "__main__":
    main()
