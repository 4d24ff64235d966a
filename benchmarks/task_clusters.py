"""Two clusters of tasks, and ten tasks that belong to neither: `python -m benchmarks.task_clusters [--help]`.

Twelve outputs as in `examples/task_clusters.py`. For each seed: whether the similarity of tasks that a prior has
learned separates the clusters (adjusted Rand index of average linkage), its log score of new rows against that of the
exchangeable prior, and what ten further tasks with coefficients of their own cost the twelve.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.special import comb

import bayesmeta as bm
from examples.task_clusters import COEFFICIENTS, GROUPS, NOISE, SPREAD, Friedman

ROWS, SCORED, UNRELATED, WIDE = 12, 200, 10, 1.5
STARTS = 12
MOST_LOST, LEAST_INDEX = 0.01, 0.95
sharing = bm.models.sharing
PRIORS = {
    "exchangeable": sharing.Gaussian(),
    "factors": sharing.Factors(),
    "clusters": sharing.Clusters(),
    "contaminated factors": sharing.Contaminated(sharing.Factors()),
    "contaminated clusters": sharing.Contaminated(sharing.Clusters()),
}


def outputs(seed: int) -> tuple[bm.Tasks, bm.Tasks]:
    """Rows to learn from and rows to score: twelve outputs in two clusters, then ten that are unrelated."""
    generator = np.random.default_rng(seed)
    weight = GROUPS[:, None] * COEFFICIENTS + SPREAD * generator.normal(size=(len(GROUPS), 4))
    weight = np.concatenate([weight, WIDE * generator.normal(size=(UNRELATED, 4))])
    names = [f"output {i + 1}" for i in range(len(GROUPS))] + [f"unrelated {i + 1}" for i in range(UNRELATED)]

    def rows(count: int) -> bm.Tasks:
        x = generator.uniform(size=(len(weight), count, 5))
        y = np.einsum("tnk,tk->tn", Friedman()(torch.as_tensor(x)).numpy(), weight)
        return bm.Tasks.from_arrays(list(x), list(y + NOISE * generator.normal(size=y.shape)), names=names)

    return rows(ROWS), rows(SCORED)


def rand_index(alike: np.ndarray) -> float:
    """Adjusted Rand index of two clusters by average linkage of 1 − similarity against the true ones."""
    tree = linkage(squareform((1 - alike).clip(min=0), checks=False), "average")
    table = np.array([np.bincount(fcluster(tree, 2, "maxclust")[GROUPS == g], minlength=3) for g in (1.0, -1.0)])
    together, mine, true = (comb(counts, 2).sum() for counts in (table, table.sum(0), table.sum(1)))
    chance = mine * true / comb(len(GROUPS), 2)
    return float((together - chance) / (0.5 * (mine + true) - chance))


def scores(prior: str, given: bm.Tasks, scored: bm.Tasks, seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Log scores of the twelve outputs' rows `(12, M)`, and the similarity of tasks."""
    model = bm.models.multitask(Friedman(), features=4, sharing=PRIORS[prior])
    method = bm.Marginal("normal", chains=1, draws=draws, starts=STARTS)
    fit = bm.fit(model, given, method=method, seed=seed, progress=False)
    post = fit.posterior(given, draws=2 * draws, seed=seed)
    if any(post.flag):
        print(f"    {prior}: {sum(map(bool, post.flag))} of {len(given)} posteriors flagged")
    twelve = np.arange(len(GROUPS))
    return post.predict(scored).log_prob()[twelve], model.similarity(post)[np.ix_(twelve, twelve)]


def main() -> None:
    """Prints each seed and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--priors", nargs="+", choices=list(PRIORS), default=["factors", "contaminated factors"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=400)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {prior: [] for prior in options.priors}
    for seed in range(options.seeds):
        given, scored = outputs(seed)
        alone = slice(0, len(GROUPS))
        base, _ = scores("exchangeable", given[alone], scored[alone], seed, options.draws)
        for prior in options.priors:
            start = time.perf_counter()
            mine, alike = scores(prior, given[alone], scored[alone], seed, options.draws)
            beside, _ = scores(prior, given, scored, seed, options.draws)
            row = rand_index(alike), float((mine - base).mean()), float((mine - beside).mean())
            found[prior].append(row)
            print(
                f"seed {seed}, {prior}: index {row[0]:.2f}, to exchangeable {row[1]:+.4f}, lost to unrelated tasks "
                f"{row[2]:+.4f} nats a row; {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    for prior, rows in found.items():
        index, gain, lost = np.array(rows).T
        error = [v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else np.nan for v in (gain, lost)]
        print(
            f"{prior}: least index {index.min():.2f} (bar {LEAST_INDEX}), gain {gain.mean():+.4f} ± {error[0]:.4f} "
            f"(bar > 0), lost {lost.mean():+.4f} ± {error[1]:.4f} (bar {MOST_LOST})"
        )


if __name__ == "__main__":
    main()
