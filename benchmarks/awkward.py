"""Inference against reference moments of awkward task posteriors: `python -m benchmarks.awkward [--models phase …]`.

For each model: the share of tasks that are not flagged, and how far the worst of these is from the reference, in exact
sds. An unflagged task is missed if it is beyond 0.3 sd in a mean or 30 % in an sd. `--new` also infers tasks that the
fit has not seen.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

import bayesmeta as bm
from benchmarks.awkward_densities import REFERENCES
from benchmarks.awkward_models import CASES
from benchmarks.references import Truth

MEAN_LIMIT, SD_LIMIT = 0.3, 0.3
ENOUGH = 0.7
"""Share of tasks that should not be flagged."""


@dataclass(frozen=True)
class Verdict:
    """How the posteriors of T tasks compare with reference moments.

    Attributes:
        names: Task names.
        error: Largest |error of a mean| of each task, in reference sds `(T,)`.
        ratio: The sd ratio of each task that is furthest from 1, on the log scale `(T,)`.
        flagged: Whether the inference itself says that something is wrong `(T,)`.
        khat, ess, method: What it reports `(T,)`.
    """

    names: tuple[str, ...]
    error: np.ndarray
    ratio: np.ndarray
    flagged: np.ndarray
    khat: np.ndarray
    ess: np.ndarray
    method: np.ndarray

    @property
    def off(self) -> np.ndarray:
        """Tasks beyond the limits; so is one that is not a number `(T,)`."""
        return ~((self.error <= MEAN_LIMIT) & (np.abs(self.ratio - 1) <= SD_LIMIT))

    @property
    def missed(self) -> np.ndarray:
        """Tasks that are off and not flagged `(T,)`."""
        return self.off & ~self.flagged

    @property
    def unflagged(self) -> float:
        """Share of tasks that are not flagged."""
        return float(1 - self.flagged.mean())


def judge(post: bm.Posterior, truth: Truth) -> Verdict:
    """Compares every task parameter with its reference moments."""
    error, ratio = [], []
    for site, mean in truth.mean.items():
        flat = (len(mean), -1)
        error.append((np.abs(post.mean(site) - mean) / truth.sd[site]).reshape(flat))
        ratio.append((post.sd(site) / truth.sd[site]).reshape(flat))
    ratios = np.concatenate(ratio, 1)
    with np.errstate(divide="ignore"):
        furthest = np.abs(np.log(ratios)).argmax(1)
    worst = ratios[np.arange(len(ratios)), furthest]
    worst_error = np.concatenate(error, 1).max(1)
    return Verdict(post.names, worst_error, worst, post.flag != "", post.khat, post.ess, post.method)


def line(name: str, verdict: Verdict, seconds: tuple[float, float]) -> str:
    """One line of the table."""
    kept = ~verdict.flagged
    error = verdict.error[kept].max() if kept.any() else np.nan
    ratios = verdict.ratio[kept] if kept.any() else np.array([np.nan])
    furthest = ratios[np.abs(np.log(ratios)).argmax()]
    methods = ", ".join(f"{m} {n}" for m, n in sorted(Counter(verdict.method).items()))
    share = verdict.missed.sum() / max(1, kept.sum())
    return (
        f"{name:17s} {len(kept):5d} {verdict.unflagged:9.0%} {error:10.2f} {furthest:9.2f} {share:7.0%} "
        f"{(verdict.off & verdict.flagged).sum():4d}/{verdict.flagged.sum():<4d} "
        f"{seconds[0]:6.1f} {seconds[1]:6.1f}  {methods}"
    )


HEADER = (
    "model             tasks unflagged worst mean  worst sd  missed  off/flagged  fit s post s  methods\n"
    "                          (share)       (sd)   (ratio) (share)"
)


def details(verdict: Verdict, tasks: bm.Tasks, *, limit: int = 5) -> list[str]:
    """A line for each of the first tasks that are off and not flagged."""
    missed = np.flatnonzero(verdict.missed)
    lines = [
        f"    missed: task {verdict.names[i]}, {tasks.sizes[i]} rows: mean off by {verdict.error[i]:.2f} sd, sd ratio "
        f"{verdict.ratio[i]:.2f}; {verdict.method[i]}, k̂ {verdict.khat[i]:.2f}, relative ESS {verdict.ess[i]:.2f}"
        for i in missed[:limit]
    ]
    return lines + ([f"    missed: {len(missed) - limit} more"] if len(missed) > limit else [])


@dataclass(frozen=True)
class Run:
    """Tasks of a model, the verdict on them, and seconds of the fit and of the posterior."""

    tasks: bm.Tasks
    verdict: Verdict
    seconds: tuple[float, float]


def run(name: str, options: argparse.Namespace) -> dict[str, Run]:
    """Fits a model of the collection and judges its "known" tasks, and "new" ones if asked."""
    case, start = CASES[name], time.perf_counter()
    known = case.tasks(count=options.tasks, seed=options.seed)
    fit = bm.fit(case.model, known, method=options.method, seed=options.seed, progress=False)
    fitted = time.perf_counter() - start
    found = {}
    for kind in ("known", "new") if options.new else ("known",):
        tasks = known if kind == "known" else case.tasks(count=options.tasks, seed=options.seed + 1000)
        draws = options.draws if kind == "known" else options.new_draws
        start = time.perf_counter()
        post = fit.posterior(tasks, draws=draws, refine=options.refine, seed=options.seed)
        seconds = fitted, time.perf_counter() - start
        found[kind] = Run(tasks, judge(post, REFERENCES[name](tasks, None if kind == "known" else known)), seconds)
    return found


def verdict_on(found: dict[str, Verdict]) -> str:
    """The summary over all models that were run."""
    if not found:
        return "no model ran"
    awkward = [v for name, v in found.items() if not CASES[name].easy]
    easy = [v.flagged for name, v in found.items() if CASES[name].easy]
    missed = sum(int(v.missed.sum()) for v in found.values())
    enough = sum(v.unflagged >= ENOUGH for v in awkward)
    alarms = f"{np.concatenate(easy).mean():.1%}" if easy else "not run"
    clean = sum(not v.missed.any() for v in awkward)
    return (
        f"{missed} tasks off and not flagged; {clean} of {len(awkward)} awkward models without any; {enough} of "
        f"{len(awkward)} with at least {ENOUGH:.0%} unflagged; false alarms on easy models {alarms}"
    )


def main() -> None:
    """Runs the chosen models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--new-draws", type=int, default=10_000, help="of new tasks, which have one candidate a draw")
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="amortized")
    parser.add_argument("--refine", default="auto")
    parser.add_argument("--new", action="store_true", help="also judge tasks that the fit has not seen")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Run]] = {}
    print(HEADER)
    for name in options.models:
        try:
            found[name] = run(name, options)
        except ValueError as error:
            print(f"{name:17s} failed: {error}", flush=True)
            continue
        for kind, done in found[name].items():
            label = name if kind == "known" else f"{name[:11]}, new"
            print("\n".join([line(label, done.verdict, done.seconds), *details(done.verdict, done.tasks)]), flush=True)
    for kind in ("known", "new") if options.new else ("known",):
        print(f"{kind} tasks:", verdict_on({name: runs[kind].verdict for name, runs in found.items()}))
    print(f"failed: {[name for name in options.models if name not in found]}")


if __name__ == "__main__":
    main()
