"""Trial runs of a model, before it is used: it must treat tasks one by one, and rows by their mask.

Batches of other sizes show what a single reading cannot: data in a closure, one latent value a row, shared terms that
look at the data, tasks that see each other, sites that count padded rows. Called by `density.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.latents import Structure
from bayesmeta.hierarchy.tracing import ObservedSite, Trace

PROBE_TASKS = 3
"""How many tasks the model is read with."""

_CANDIDATES = 64
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}

Run = Callable[[list[int], int], Trace]
Same = Callable[[Tensor, Tensor], bool]

_FAILED = (
    "the model function failed on a batch of {tasks} task(s) padded to {rows} row(s): {error}. If it uses data from "
    "outside whose size depends on the tasks or rows, pass it as a column (columns=, task_columns=) and read batch[...]"
)


def first_rows(tasks: Tasks) -> tuple[list[int], int]:
    """Tasks and rows of the first reading: two rows at least, so that rows cannot be taken for one value a task."""
    index = list(range(min(PROBE_TASKS, len(tasks))))
    return index, max(2, int(tasks.sizes[index].max()))


def attempt(run: Run, index: list[int], rows: int) -> Trace:
    """Runs a model on tasks padded to `rows`.

    Raises:
        ValueError: The function failed; most often its sizes do not follow the batch.
    """
    try:
        return run(index, rows)
    except (RuntimeError, IndexError) as error:
        raise ValueError(_FAILED.format(tasks=len(index), rows=rows, error=error)) from error
    except ValueError as error:
        if not str(error).startswith("Shape mismatch inside plate"):
            raise
        raise ValueError(_FAILED.format(tasks=len(index), rows=rows, error=error)) from error


def probe(run: Run, tasks: Tasks, structure: Structure, dtype: torch.dtype) -> dict[str, Any]:
    """Compares trial runs.

    Args:
        run: `(positions of tasks, rows to pad to) -> Trace`, at the same coordinates for the middle task of each batch.
        tasks: The tasks.
        structure: What the first reading found.
        dtype: Decides how far numbers may differ.

    Returns:
        What it found out, as attributes of `Structure`.

    Raises:
        ValueError: The model cannot be used as it is, with the cure.
    """
    small, large = _small_and_large(tasks)
    rows = max(1, int(tasks.sizes[large]))
    several = [large, large, small, large]
    among, padded = attempt(run, several, rows), attempt(run, several, rows + 1)
    alone = attempt(run, [small], rows)
    own = attempt(run, [small], max(1, int(tasks.sizes[small])))
    for other in (among, padded, alone):
        _check_sites(other, structure)
    tolerance = _TOLERANCE.get(dtype, 1e-4)
    same = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance, equal_nan=True)
    _check_shared(among, padded, alone, same)
    if not same(among.log_task()[2:3], alone.log_task()):
        raise ValueError(
            "the density of one task depends on the other tasks of the batch (a mean or a normalisation over tasks?); "
            "every task must stand alone: pass such numbers as a task column (task_columns=)"
        )
    values = tuple(n for n in structure.task_values if _a_task(among, n) and _a_task(padded, n))
    return {"task_values": values} | _padding([(among, padded), (alone, own)], same)


def _padding(runs: list[tuple[Trace, Trace]], same: Same) -> dict[str, Any]:
    """Which sites notice that the same tasks are padded to other sizes."""
    sites = [site.name for site in runs[0][0].observed if not site.shared]
    unmasked = tuple(n for n in sites if not all(same(a.rows[n].sum(-1), b.rows[n].sum(-1)) for a, b in runs))
    first, second = runs[0]
    coupled = tuple(a.name for a, b in zip(first.observed, second.observed, strict=True) if a.event != b.event)
    priors = all(same(a.log_prior(), b.log_prior()) for a, b in runs)
    return {"exact_size": bool(unmasked or coupled) or not priors, "coupled": coupled, "unmasked": unmasked}


def _small_and_large(tasks: Tasks) -> tuple[int, int]:
    """A task with few and one with many rows among the first (the same one twice if there is only one)."""
    sizes = tasks.sizes[:_CANDIDATES]
    filled = np.flatnonzero(sizes > 0)
    filled = filled if len(filled) else np.arange(len(sizes))
    order = filled[np.argsort(sizes[filled], kind="stable")]
    return int(order[0]), int(order[-1])


def _a_task(trace: Trace, name: str) -> bool:
    return tuple(trace.task_values[name].shape[:2]) == (trace.tasks, 1)


def _names(sites: Iterable[ObservedSite]) -> list[str]:
    return [site.name for site in sites]


def _check_sites(trace: Trace, structure: Structure) -> None:
    expected = {site.name: site for site in (*structure.shared, *structure.task)}
    found = {name: (in_tasks, fn) for name, in_tasks, fn in trace.latent}
    before, after = ([*expected, *_names(structure.observed)], [*found, *_names(trace.observed)])
    if sorted(before) != sorted(after):
        raise ValueError(
            f"the model has other sites in another batch: {sorted(before)}, then {sorted(after)}; every call must run "
            "the same pyro.sample statements, whatever the data"
        )
    for name, (in_tasks, fn) in found.items():
        shape = tuple(fn.shape())[2:] if in_tasks else tuple(fn.shape())
        if shape != expected[name].shape:
            where = "task" if in_tasks else "shared"
            raise ValueError(
                f"{where} site {name!r} has shape {expected[name].shape} in one batch and {shape} in another; its size "
                "must not depend on the tasks or rows: sample one value a task in batch.tasks() "
                "(one a row: integrate it into the likelihood, or index a vector by a column)"
            )


def _check_shared(among: Trace, padded: Trace, alone: Trace, same: Same) -> None:
    if same(among.shared_prior, padded.shared_prior) and same(among.shared_prior, alone.shared_prior):
        return
    outside = [site.name for site in among.observed if site.shared]
    raise ValueError(
        f"the log density outside batch.tasks() depends on the batch (observed sites there: {outside}); put observed "
        "sites inside `with batch.tasks():` (and batch.observations()), and let shared priors use constants only"
    )
