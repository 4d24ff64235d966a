"""Posteriors of the radon models against exact ones: `python -m benchmarks.exactness [--draws 20000] [--seed 0]`."""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import bayesmeta as bm
from benchmarks.radon_models import counties, exact, exact_tasks, intercepts, slopes

SHARED_SLOPES = {
    "mu_alpha": ("mu", 0),
    "mu_beta": ("mu", 1),
    "sigma_alpha": ("tau", 0),
    "sigma_beta": ("tau", 1),
    "sigma_y": ("sigma_y", ...),
}
SHARED_INTERCEPTS = {name: (name, ...) for name in ("mu_alpha", "sigma_alpha", "beta", "sigma_y")}


def report_tasks(post: bm.Posterior, moments: np.ndarray, site: str) -> dict[str, float]:
    """Errors of task parameters in exact posterior sds."""
    shape = moments[0].shape
    mean, sd = post.mean(site).reshape(shape), post.sd(site).reshape(shape)
    error, ratio = (mean - moments[0]) / moments[1], sd / moments[1]
    result = {"rms error of means": float(np.sqrt((error**2).mean()))}
    result |= {"lowest sd ratio": float(ratio.min()), "highest sd ratio": float(ratio.max())}
    return result | {"flagged": float((post.flag != "").sum()), "highest khat": float(post.khat.max())}


def report_shared(fit: bm.Fit, moments: dict[str, tuple[float, float]], names: dict[str, tuple]) -> dict[str, float]:
    """Largest error of the shared means in exact sds, and the extreme sd ratios."""
    errors, ratios = [], []
    for name, (site, at) in names.items():
        mean, sd = moments[name]
        errors.append(abs(fit.shared.mean(site)[at] - mean) / sd)
        ratios.append(fit.shared.sd(site)[at] / sd)
    result = {"worst shared mean": float(np.max(errors)), "theta ess": fit.shared.ess, "theta khat": fit.shared.khat}
    return result | {"lowest shared sd ratio": float(np.min(ratios)), "highest shared sd ratio": float(np.max(ratios))}


def conditional_draws(theta: dict[str, np.ndarray], tasks: bm.Tasks, seed: int) -> np.ndarray:
    """Exact draws of intercept and slope of every county at given θ: `(draw, county, 2)`."""
    generator = torch.Generator().manual_seed(seed)
    mu, tau, sigma = (torch.as_tensor(theta[name]) for name in ("mu", "tau", "sigma_y"))
    drawn = []
    for task in tasks:
        design = torch.cat([torch.ones(len(task.x), 1), task.x], 1).double()
        precision = design.mT @ design / sigma[:, None, None] ** 2 + torch.diag_embed(tau**-2)
        right = design.mT @ task.y.double() / sigma[:, None] ** 2 + mu * tau**-2
        factor = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
        noise = torch.randn(*mean.shape, 1, generator=generator, dtype=torch.float64)
        drawn.append(mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True).squeeze(-1))
    return torch.stack(drawn, 1).numpy()


def report_pairs(post: bm.Posterior, tasks: bm.Tasks, seed: int) -> dict[str, float]:
    """Ratios of sds of differences between counties, and to the shared mean, to those of exact draws at the same θ."""
    ours, theta = post.draws("phi")[..., 0], post.shared
    truth = conditional_draws(theta, tasks, seed)[..., 0]
    pairs = np.random.default_rng(seed).integers(0, len(tasks), (200, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    mu = theta["mu"][:, :1]
    first, second = pairs.T
    between = (ours[:, first] - ours[:, second]).std(0) / (truth[:, first] - truth[:, second]).std(0)
    shared = (ours - mu).std(0) / (truth - mu).std(0)
    return {
        "sd(a - b) lowest ratio": float(between.min()),
        "sd(a - b) highest ratio": float(between.max()),
        "sd(a - mu) lowest ratio": float(shared.min()),
        "sd(a - mu) highest ratio": float(shared.max()),
    }


def run(name: str, seed: int, draws: int) -> dict[str, float]:
    """Fits one model on all counties and reports every figure."""
    tasks = counties()
    with_slopes = name == "slopes"
    moments = exact("radon_mn_variable_intercept_slope" if with_slopes else "radon_mn_variable_intercept")
    start, cpu = time.perf_counter(), time.process_time()
    fit = bm.fit(slopes if with_slopes else intercepts, tasks, seed=seed, progress=False)
    result = {"fit wall s": time.perf_counter() - start, "fit cpu s": time.process_time() - cpu}
    start = time.perf_counter()
    post = fit.posterior(tasks, draws=draws, seed=seed)
    result["posterior wall s"] = time.perf_counter() - start
    parameters = ("alpha", "beta") if with_slopes else ("alpha",)
    result |= report_tasks(post, exact_tasks(moments, parameters, len(tasks)), "phi" if with_slopes else "alpha")
    result |= report_shared(fit, moments, SHARED_SLOPES if with_slopes else SHARED_INTERCEPTS)
    return result | (report_pairs(post, tasks, seed) if with_slopes else {})


def main() -> None:
    """Prints the figures of both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("intercepts", "slopes"):
        print(f"radon, {name}, seed {options.seed}, {options.draws} draws")
        for label, value in run(name, options.seed, options.draws).items():
            print(f"  {label:28s} {value:9.3f}")


if __name__ == "__main__":
    main()
