"""New counties: the learned prior against no pooling and complete pooling over random splits of the radon counties.

    python -m benchmarks.new_counties --splits 20

In every split 68 of the 85 counties are learned from and the 17 others are new. Each new county is given 0, 1, 2, 3 and
5 of its homes, drawn at random, and the rest are scored. A score is averaged over the homes of a county, then over the
splits in which the county was new, then over counties; standard errors are over counties. Coverage is the share of all
held-out homes; the one averaged over counties is printed too. Log scores are those of single homes, in nats. The fits
need no tuning and nothing is cached.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence

import pandas
import torch

import bayesmeta as bm
from bayesmeta.checks import sharing

DATA = pathlib.Path(bm.__file__).parent / "data" / "radon.csv"
NEW = 17
CONTEXTS = (0, 1, 2, 3, 5)
BOUND_AT_ZERO = 0.02
COVERAGE = (0.87, 0.93)


def model() -> bm.HierarchicalModel:
    """Intercept and slope of every county, independent; standard deviations ~ HalfNormal(1)."""
    return bm.HierarchicalModel(
        bm.priors.Gaussian(2, loc_scale=10.0, sd_scale=1.0),
        lambda phi, x: phi[..., 0] + phi[..., 1] * x[..., 0],
        bm.likelihoods.Normal(prior_scale=1.0),
    )


def one_split(homes: bm.Tasks, seed: int, *, draws: int, method: bm.Amortized) -> sharing.Comparison:
    """Compares the ways of sharing on one split."""
    known, new = homes.split(new=NEW, seed=seed)
    return sharing.compare(model(), known, new, contexts=CONTEXTS, draws=draws, seed=seed, method=method)


def bars(result: sharing.Comparison) -> list[tuple[str, bool]]:
    """What must hold: the figure in words, and whether it does."""
    out = []
    for context in result.contexts:
        for other in sharing.SCHEMES[:2]:
            gain, error = result.gain(other, context)
            limit = 0.0 if context else -BOUND_AT_ZERO
            out.append(
                (f"{context} homes: log score − {other} = {gain:+.4f} ± {error:.4f} (> {limit:g})", gain > limit)
            )
        share, error = result.score("learned prior", context, "coverage of rows")
        by_county = 100 * result.score("learned prior", context, "coverage")[0]
        text = f"{context} homes: 90 % intervals cover {100 * share:.1f} ± {100 * error:.1f} % of homes (87–93)"
        out.append((f"{text}; averaged over counties {by_county:.1f} %", COVERAGE[0] <= share <= COVERAGE[1]))
    return out


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the benchmark, prints its figures, and returns whether every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=None, help="training steps; by default training stops by itself")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    homes = bm.Tasks.from_dataframe(pandas.read_csv(DATA), task="county", x=["floor"], y="log_radon")
    method = bm.Amortized(optimizer=bm.Optimizer(steps=options.steps))
    parts = []
    for seed in range(options.first, options.first + options.splits):
        start, cpu = time.perf_counter(), time.process_time()
        parts.append(one_split(homes, seed, draws=options.draws, method=method))
        gains = " ".join(f"{parts[-1].gain('complete pooling', k)[0]:+.3f}" for k in CONTEXTS)
        seconds = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} CPU s"
        print(f"split {seed}: over complete pooling {gains}; flagged {parts[-1].flagged}; {seconds}", flush=True)
    result = sharing.together(parts)
    counties = len(result.tasks("learned prior", 0, "log score"))
    print(f"\n{options.splits} splits, {counties} counties were new in at least one; standard errors over counties\n")
    print(result.table(), "\n")
    checked = bars(result)
    for text, holds in checked:
        print("holds " if holds else "FAILS ", text)
    return all(holds for _, holds in checked)


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
