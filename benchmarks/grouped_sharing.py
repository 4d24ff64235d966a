"""Sharing priors on School and Parkinsons, paired with EM: `python -m benchmarks.grouped_sharing [--help]`.

The same splits as `grouped_linear.py`, heads without a trunk, their prior learned by the marginal path. Each prior is
held against the linear hierarchy by EM on the same rows: explained variance, RMSE, mean log score, coverage of 90 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import bayesmeta as bm
from benchmarks.grouped_linear import (
    CONTEXTS,
    DATA,
    INTERVAL,
    ROWS,
    UNSEEN,
    Score,
    Task,
    compare,
    parkinsons,
    predicted,
    school,
    splits,
)
from benchmarks.linear_em import LinearHierarchy

sharing = bm.models.sharing
PRIORS = {
    "coordinate": sharing.Gaussian(by="coordinate"),
    "block": sharing.Gaussian(),
    "pooled": sharing.Gaussian(by="coordinate", spread=0.5),
    "factors": sharing.Factors(),
    "laplace": sharing.Laplace(),
    "full": sharing.Gaussian(by="coordinate", cov="full"),
}
DRAWS = 300


def as_tasks(parts: Sequence[Task], prefix: str = "") -> bm.Tasks:
    """Tasks without the constant, which heads have of their own."""
    names = [f"{prefix}{i}" for i in range(len(parts))]
    return bm.Tasks.from_arrays([task.x[:, :-1] for task in parts], [task.y for task in parts], names=names)


def learn(given: Sequence[Task], prior: str, shared: str) -> bm.Fit:
    """Learns a prior from some tasks."""
    tasks = as_tasks(given)
    width = given[0].x.shape[1] - 1
    model = bm.models.multitask(features=width, sharing=PRIORS[prior], standardize=tasks)
    return bm.fit(model, tasks, method=bm.Marginal(shared=shared, chains=2, draws=DRAWS), seed=0, progress=False)


def score(fit: bm.Fit, given: bm.Tasks, held_out: Sequence[Task]) -> Score:
    """Scores the predictions of held-out rows given some rows of the same tasks."""
    new = as_tasks(held_out, given.names[0].rstrip("0123456789"))
    post = fit.posterior(given, draws=DRAWS)
    prediction = post.predict(new)
    log_prob = prediction.log_prob()
    there = ~np.isnan(log_prob)
    y, mean = np.concatenate([task.y for task in held_out]), post.predict(new, kind="mean").mean[there]
    lower, upper = (end[there] for end in prediction.interval(INTERVAL))
    squared = (y - mean) ** 2
    return Score(
        float(1 - squared.mean() / y.var()),
        float(np.sqrt(squared.mean())),
        float(log_prob[there].mean()),
        float(((y >= lower) & (y <= upper)).mean()),
    )


def report(title: str, pairs: Sequence[tuple[Score, Score]]) -> None:
    """Means over splits, and of the paired differences to EM with their standard errors."""
    ours, em = (np.array([list(vars(one[k]).values()) for one in pairs]) for k in (0, 1))
    change = ours - em
    error = change.std(0, ddof=1) / np.sqrt(len(pairs)) if len(pairs) > 1 else np.full(4, np.nan)
    print(
        f"{title:34s} EV {ours[:, 0].mean():.4f} ({change[:, 0].mean():+.4f} ± {error[0]:.4f}), "
        f"RMSE {ours[:, 1].mean():.3f} ({100 * (ours[:, 1] / em[:, 1] - 1).mean():+.2f} %), "
        f"log score {ours[:, 2].mean():.4f} ({change[:, 2].mean():+.4f} ± {error[2]:.4f}), "
        f"90 % cover {ours[:, 3].mean():.3f}",
        flush=True,
    )


def within(tasks: Sequence[Task], sizes: Sequence[int], priors: Sequence[str], seeds: range, shared: str) -> None:
    """Held-out rows of the tasks that were learned from."""
    found: dict[str, list[tuple[Score, Score]]] = {prior: [] for prior in priors}
    for seed in seeds:
        given, held_out = zip(*splits(tasks, sizes, seed), strict=True)
        em = compare(given, held_out)["hierarchy"]
        for prior in priors:
            start = time.perf_counter()
            found[prior].append((score(learn(given, prior, shared), as_tasks(given), held_out), em))
            print(f"  split {seed}, {prior}: {time.perf_counter() - start:.0f} s", flush=True)
            report(f"  {prior}", found[prior])


def unseen(tasks: Sequence[Task], prior: str, seeds: range, shared: str) -> None:
    """Tasks that the prior was not learned from, with some of their rows known."""
    found: dict[int, list[tuple[Score, Score]]] = {count: [] for count in CONTEXTS}
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(tasks))
        known, new = ([tasks[i] for i in part] for part in (order[UNSEEN:], order[:UNSEEN]))
        em = LinearHierarchy.learn([task.x for task in known], [task.y for task in known])
        fit = learn(known, prior, shared)
        cut = list(splits(new, [max(CONTEXTS)] * len(new), seed))
        for count in CONTEXTS:
            given, held_out = [a.rows(np.arange(count)) for a, _ in cut], [b for _, b in cut]
            pair = score(fit, as_tasks(given, "new"), held_out), predicted(em, given, held_out)
            found[count].append(pair)
    for count, pairs in found.items():
        report(f"  {prior}, {count} rows of an unseen task", pairs)


def main() -> None:
    """Prints the figures of both data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--priors", nargs="+", choices=list(PRIORS), default=["coordinate", "block", "pooled"])
    parser.add_argument("--shared", choices=["map", "normal", "nuts"], default="map")
    parser.add_argument("--parts", nargs="+", choices=["school", "unseen", "parkinsons"], default=["school", "unseen"])
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"skipped: {options.data} is not there; give --data a folder with school/ and parkinsons/")
        return
    seeds = range(options.splits)
    print(f"splits {list(seeds)}; {options.shared}; differences are ours minus EM's on the same split")
    if "school" in options.parts:
        schools = school(options.data)
        print("School, held-out pupils")
        within(schools, [round(0.75 * len(task.y)) for task in schools], options.priors, seeds, options.shared)
    if "unseen" in options.parts:
        print("School, unseen schools")
        unseen(school(options.data), options.priors[0], seeds, options.shared)
    if "parkinsons" in options.parts:
        patients = parkinsons(options.data)
        for rows in ROWS:
            print(f"Parkinsons, {rows} recordings a patient")
            within(patients, [rows] * len(patients), options.priors, seeds, options.shared)


if __name__ == "__main__":
    main()
