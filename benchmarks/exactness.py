"""Posteriors of five published models against exact ones: `python -m benchmarks.exactness [--help]`.

Sampled posteriors (marginal, nuts) are held against Monte Carlo errors, amortized ones against fixed bounds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import bayesmeta as bm
from benchmarks.exact_posteriors import POSTERIORS, Agreement, agreements

CHAINS = 2
MANY = 80
"""Parameters from which the root mean square of their z scores says something."""


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


Line = tuple[str, str, str, bool]
"""What, its value, its bar, and whether it holds."""


def show(lines: list[Line]) -> None:
    """Prints figures, and which are missed."""
    for label, value, bar, holds in lines:
        print(f"  {label:32s} {value:>13s} (bar {bar}){'' if holds else '   MISSED'}")


def report_sampled(found: dict[str, Agreement]) -> None:
    """Prints errors in Monte Carlo errors."""
    every = list(found.values())
    z, ratios = np.array([one.z for one in every]), np.array([one.ratio for one in every])
    means, sds = sum(not one.mean_agrees for one in every), sum(not one.sd_agrees for one in every)
    lines: list[Line] = [("means off by more than 4 MCSE", str(means), "0", not means)]
    lines.append(("sds off by max(2 %, 4 MCSE)", str(sds), "0", not sds))
    if len(every) >= MANY:
        rms = float(np.sqrt((z**2).mean()))
        lines.append(("rms of z", f"{rms:.2f}", ".8-1.2", 0.8 <= rms <= 1.2))
    show(lines)
    print(f"  worst z {np.abs(z).max():.2f}, sd ratios {ratios.min():.3f}-{ratios.max():.3f}")


def report_amortized(found: dict[str, Agreement], shared: tuple[str, ...], fit: bm.Fit, post: bm.Posterior) -> None:
    """Prints errors in exact posterior sds."""
    tasks = [one for name, one in found.items() if name not in shared]
    rms, ratios = np.sqrt(np.mean([one.error**2 for one in tasks])), np.array([one.ratio for one in tasks])
    worst, theta = max(abs(found[name].error) for name in shared), np.array([found[name].ratio for name in shared])
    flagged = int((post.flag != "").sum())
    show(
        [
            ("rms error of task means", f"{rms:.3f}", "<= .03", bool(rms <= 0.03)),
            ("sd ratios of tasks", spread(ratios), ".95-1.05", within(ratios, 0.05)),
            ("worst shared mean", f"{worst:.3f}", "<= .1", worst <= 0.1),
            ("sd ratios of shared", spread(theta), ".9-1.1", within(theta, 0.1)),
            ("ESS of theta", f"{fit.shared.ess:.2f}", ">= .25", fit.shared.ess >= 0.25),
            ("flagged tasks", str(flagged), "0", flagged == 0),
        ]
    )
    print(f"  theta {fit.shared.status}, k-hat {fit.shared.khat:.2f}; worst k-hat of a task {np.nanmax(post.khat):.2f}")


def spread(ratios: np.ndarray) -> str:
    """Lowest and highest."""
    return f"{ratios.min():.3f}-{ratios.max():.3f}"


def within(ratios: np.ndarray, share: float) -> bool:
    """Whether all ratios are within a share of one."""
    return bool(np.all(np.abs(ratios - 1) <= share))


def run(name: str, method: str, seed: int, draws: int) -> None:
    """Fits one model by one method and prints every figure."""
    spec = POSTERIORS[name]
    tasks = spec.tasks()
    methods = {
        "amortized": bm.Amortized(),
        "marginal": bm.Marginal(chains=CHAINS, draws=draws),
        "nuts": bm.NUTS(chains=CHAINS, draws=draws),
    }
    start, cpu = time.perf_counter(), time.process_time()
    fit = bm.fit(spec.model, tasks, method=methods[method], seed=seed, progress=False)
    fitted, fitted_cpu = time.perf_counter(), time.process_time()
    chains = 1 if method == "amortized" else CHAINS
    post = fit.posterior(tasks, draws=chains * draws, seed=seed)
    found = agreements(name, post, chains=chains)
    print(f"{name}, {method}, seed {seed}, {chains} x {draws} draws; tasks by {'/'.join(sorted(set(post.method)))}")
    print(f"  fit {fitted - start:.1f} s, {fitted_cpu - cpu:.1f} CPU s; posterior {time.perf_counter() - fitted:.1f} s")
    if method != "amortized":
        return report_sampled(found)
    report_amortized(found, tuple(spec.shared), fit, post)
    if name == "radon_mn_variable_intercept_slope":
        pairs = report_pairs(post, tasks, seed)
        show([(label, f"{value:.3f}", ".92-1.08", abs(value - 1) <= 0.08) for label, value in pairs.items()])


def main() -> None:
    """Prints the figures of the chosen posteriors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("amortized", "marginal", "nuts"), default="amortized")
    parser.add_argument("--posterior", choices=("all", *POSTERIORS), default="all")
    parser.add_argument("--draws", type=int, default=20_000, help="a chain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in POSTERIORS if options.posterior == "all" else (options.posterior,):
        run(name, options.method, options.seed, options.draws)


if __name__ == "__main__":
    main()
