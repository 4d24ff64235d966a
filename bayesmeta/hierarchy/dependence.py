"""What depends on what in a model, found by trying: values of tasks on rows, sites on each other.

Called by `density.py`, whose recorded functions are tried here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesmeta.hierarchy.recording import Recorded
from bayesmeta.hierarchy.tracing import Site

Arguments = tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]
"""`(theta, noise, data, values)` of one task."""
TRIED = (0.3, -0.4)
"""Noise between which a site is moved."""


def reads_rows(values: Recorded, full: Arguments, empty: Arguments) -> bool:
    """Whether values of a task depend on its rows, or cannot be computed without.

    Args:
        values: Arguments -> values by site.
        full: A task with rows.
        empty: The same task without.
    """
    read = values.inputs(lambda node: bool(node.users), *full, eagerly=True)[2]
    if any(read[key] for key in read if key != "task_weight" and not key.startswith("task_column:")):
        return True
    try:
        bare = values(*empty)
    except (RuntimeError, IndexError, ValueError):
        return True
    return not all(torch.equal(bare[name], value) for name, value in values(*full).items())


def stages(
    sites: Sequence[Site], values: Callable[[Tensor], Mapping[str, Any]], dtype: torch.dtype
) -> tuple[tuple[int, ...], ...]:
    """Coordinates of the sites by stage; what `values` of a site's noise `(1, d)` depend on comes before it."""
    stops = itertools.accumulate(site.size for site in sites)
    places = {site.name: range(stop - site.size, stop) for site, stop in zip(sites, stops, strict=True)}
    size = sum(site.size for site in sites)
    level: dict[str, int] = {}
    for site in sites:
        before = [level[name] for name in level if _moves(values, places[name], site.name, size, dtype)]
        level[site.name] = max(before) + 1 if before else int(not site.positive)
    return tuple(
        tuple(itertools.chain(*(places[name] for name in level if level[name] == at)))
        for at in sorted(set(level.values()))
    )


def _moves(
    values: Callable[[Tensor], Mapping[str, Any]], place: range, name: str, size: int, dtype: torch.dtype
) -> bool:
    """Whether the noise at a place moves the value of another site."""
    first = torch.full((1, size), TRIED[0], dtype=dtype)
    second = first.clone()
    second[:, place] = TRIED[1]
    return not torch.equal(values(first)[name], values(second)[name])
