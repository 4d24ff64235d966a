"""Time of an exact meta-analysis after the first call: `python -m benchmarks.meta_analysis [--rounds 30]`.

A call, alone and with everything a report needs (summary, table of studies, weights, Bayes factor).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pyro.distributions as dist
import torch

import bayesmeta as bm

BAR = 0.1
SCHOOLS = (np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18]))


def simulated(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    errors = rng.uniform(0.2, 2.0, count)
    return rng.normal(0.3, np.hypot(0.5, errors)), errors


def report(found: bm.models.MetaAnalysis) -> None:
    found.summary(), found.shrinkage(), found.bayes_factor_tau0  # noqa: B018


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    cases = {"eight schools": SCHOOLS} | {f"{k:,} studies": simulated(k) for k in (2, 30, 1000, 10_000)}
    for name, (effects, errors) in cases.items():
        for label, prior in {"half-Cauchy": dist.HalfCauchy(5.0), "half-normal": dist.HalfNormal(1.0)}.items():
            calls, reports = [], []
            for _ in range(1 + (rounds if len(effects) < 5000 else 3)):
                start = time.perf_counter()
                found = bm.models.meta_analysis(effects, errors, tau_prior=prior)
                middle = time.perf_counter()
                report(found)
                calls.append(middle - start)
                reports.append(time.perf_counter() - middle)
            call, rest = np.median(calls[1:]), np.median(reports[1:])
            print(
                f"{name:15s} {label:12s} call {1e3 * call:6.1f} ms (bar {1e3 * BAR:.0f}), report {1e3 * rest:7.1f} ms"
            )


if __name__ == "__main__":
    main()
