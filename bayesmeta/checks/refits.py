"""Calibration of whole fits: every replicate simulates θ and tasks, fits the model to them, and ranks what was true.

Slow by nature, so that every replicate is written to a file and a rerun goes on where an earlier one stopped. All
replicates have tasks of the same sizes, and data are inputs of the recorded graphs: the model is read once, and what
one fit has compiled the others find in torch's cache. `benchmarks/sbc.py` drives it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from bayesmeta.checks.calibration import Calibration, ranked, same_sites
from bayesmeta.checks.simulations import LOG_LIKELIHOOD, shells, simulate_each
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import fit
from bayesmeta.hierarchy.density import Read, TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.hierarchy.tracing import Model
from bayesmeta.results.arguments import check_model, check_tasks, check_whole

POSTERIOR_DRAWS = 1000
PathLike = str | os.PathLike[str]


def sbc_fit(
    model: Model,
    like: Tasks,
    *,
    truth: Model | None = None,
    replicates: int = 100,
    draws: int = 99,
    method: Any = "amortized",
    seed: int = 0,
    file: PathLike | None = None,
) -> Calibration:
    """Simulation-based calibration of the whole pipeline: θ and tasks are simulated, fitted, and ranked in the fit.

    Ranked are all shared parameters and those of one task a replicate, chosen at random: the tasks of one replicate
    share their θ and its posterior, so that their ranks would not be independent.

    Args:
        model: Pyro function of a `Batch`, or a `HierarchicalModel`; it is what is fitted.
        like: The tasks of every replicate; they lend their x, columns and sizes.
        truth: The model that simulates, by default `model`.
        replicates: Fits in all, those already in the file counted.
        draws: Posterior draws L that are kept of each fit, evenly spaced.
        method: As in `bm.fit`.
        seed: Of everything; replicate r depends on the seed and r alone.
        file: A file of results, rewritten after every replicate, complete or not at all; a rerun goes on after them.

    Returns:
        The ranks by component; a replicate is flagged where θ is not corrected or the task's posterior is flagged.

    Raises:
        ValueError: A shared site has an improper prior, the tasks have weights, or the file belongs to another run.
    """
    check_model(model)
    check_tasks("like", like)
    check_whole("replicates", replicates, 1)
    check_whole("draws", draws, 1)
    with seeded(seed, "sbc_fit"):
        density = TaskDensity(model, like)
        world = density if truth is None else same_sites(density, TaskDensity(truth, like))
    tasks = shells(like, len(like), name="task")
    key = {"draws": draws, "seed": seed, "sizes": like.sizes.tolist(), "method": str(method)}
    key |= {"sites": [*density.structure.shared_values, *density.structure.task_values]}
    done = [] if file is None else _read(Path(file), key)
    for replicate in tqdm(range(len(done), replicates), disable=None, leave=False):
        done.append(_replicate(Read(density), world, tasks, method, draws, (seed, replicate)))
        if file is not None:
            _write(Path(file), {"run": key, "replicates": done})
    return _calibration(done[:replicates], draws)


def _replicate(
    model: Read, world: TaskDensity, like: Tasks, method: Any, draws: int, at: tuple[int, int]
) -> dict[str, Any]:
    """One replicate as plain data."""
    start = time.perf_counter(), time.process_time()
    seed = int(np.random.SeedSequence(at).generate_state(1)[0])
    with seeded(seed, "simulation"):
        data = simulate_each(world, like, world.draw_theta(1).expand(len(like), -1))
    chosen = int(np.random.default_rng(seed).integers(len(like)))
    learned = fit(model, data.tasks, method=method, seed=seed, progress=False)
    post = learned.posterior(data.tasks[[chosen]], draws=POSTERIOR_DRAWS, seed=seed)
    drawn = {name: _thinned(learned.shared.draws(name), draws)[:, None] for name in learned.shared.names}
    drawn |= {name: _thinned(post.draws(name), draws) for name in post.sites}
    true = {name: value[[chosen]] for name, value in data.values(world).items() if name != LOG_LIKELIHOOD}
    status = learned.shared.status
    flag = [post.flag[0], "" if status in ("corrected", "sampled") else f"θ is {status}"]
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "ranks": {name: int(rank[0]) for name, rank in ranked(drawn, true, seed=seed).items()},
        "size": int(like.sizes[chosen]),
        "flag": "; ".join(part for part in flag if part),
        "wall": seconds[0],
        "cpu": seconds[1],
    }


def _thinned(values: np.ndarray, count: int) -> np.ndarray:
    """`count` draws at even distances: `(draw, …)` -> `(count, …)`.

    Raises:
        ValueError: There are fewer draws.
    """
    if len(values) < count:
        raise ValueError(f"draws: expected at most {len(values)}, the draws of the fit, got {count}")
    return values[np.linspace(0, len(values) - 1, count).astype(int)]


def _calibration(done: list[dict[str, Any]], draws: int) -> Calibration:
    names = [name for name in done[0]["ranks"] if all(name in one["ranks"] for one in done)]
    ranks = {name: np.array([one["ranks"][name] for one in done]) for name in names}
    flag = np.array([one["flag"] for one in done], dtype=object)
    return Calibration(ranks, draws, np.array([one["size"] for one in done]), flag)


def _read(path: Path, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        run, done = dict(stored["run"]), list(stored["replicates"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected results of sbc_fit, got something else; choose another file") from error
    differences = list(_differences(run, key))
    if differences:
        raise ValueError(f"{path} belongs to another run ({'; '.join(differences)}); choose another file")
    return done


def _differences(run: Mapping[str, Any], key: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*run, *key}):
        if run.get(name) != key.get(name):
            yield f"{name}: {run.get(name)!r:.80} there, {key.get(name)!r:.80} here"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file in one step."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)
