"""A posterior as a table and as an ArviZ object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.results.arviz_export import to_arviz as export
from bayesmeta.results.prediction import Draws, log_rows, predict

LEVELS = (0.05, 0.5, 0.95)


class Results(Protocol):
    """What a table or an export needs to know of a posterior (`results/posterior.py`)."""

    density: TaskDensity
    tasks: Tasks
    seed: int
    joint: bool
    names: tuple[str, ...]
    khat: np.ndarray
    ess: np.ndarray
    method: np.ndarray
    flag: np.ndarray

    @property
    def sites(self) -> tuple[str, ...]:
        """Task sites."""

    @property
    def shared(self) -> dict[str, np.ndarray]:
        """Draws of θ paired with the task draws."""

    def mean(self, name: str) -> np.ndarray:
        """Posterior means."""

    def sd(self, name: str) -> np.ndarray:
        """Posterior standard deviations."""

    def quantile(self, name: str, q: float | Sequence[float]) -> np.ndarray:
        """Posterior quantiles."""

    def draws(self, name: str) -> np.ndarray:
        """Draws."""

    def paired(self) -> Draws:
        """Draws in flat coordinates."""


def summary(posterior: Results) -> Any:
    """One line a task and scalar parameter, with the task's diagnostics: a pandas DataFrame."""
    import pandas

    lines = []
    for name in posterior.sites:
        mean, sd, quantiles = posterior.mean(name), posterior.sd(name), posterior.quantile(name, LEVELS)
        for position in np.ndindex(mean.shape[1:]):
            label = name + (f"[{','.join(map(str, position))}]" if position else "")
            for task, task_name in enumerate(posterior.names):
                at = (task, *position)
                levels = {f"q{100 * q:02.0f}": quantiles[k][at] for k, q in enumerate(LEVELS)}
                lines.append({"task": task_name, "parameter": label, "mean": mean[at], "sd": sd[at], **levels})
    table = pandas.DataFrame(lines)
    diagnostics = {"method": posterior.method, "khat": posterior.khat, "ess": posterior.ess, "flag": posterior.flag}
    repeats = len(lines) // len(posterior.names)
    for name, values in diagnostics.items():
        table[name] = np.tile(np.asarray(values), repeats)
    return table


def to_arviz(posterior: Results) -> Any:
    """Groups posterior, posterior_predictive, log_likelihood, observed_data, constant_data and sample_stats."""
    density, tasks = posterior.density, posterior.tasks
    task = [density.schema.task]
    dims: dict[str, list[str]] = {}
    sampled: dict[str, np.ndarray] = {}
    for name in posterior.sites:
        sampled[name] = posterior.draws(name)[None]
        dims[name] = task + [f"{name}_dim_{i}" for i in range(sampled[name].ndim - 3)]
    for name, values in posterior.shared.items():
        sampled[name] = values[None]
        lead = [] if posterior.joint else task
        dims[name] = lead + [f"{name}_dim_{i}" for i in range(values.ndim - 1 - len(lead))]
    groups: dict[str, dict[str, np.ndarray]] = {"posterior": sampled}
    groups |= _data_groups(posterior, dims)
    groups["constant_data"] = {
        "khat": posterior.khat,
        "relative_ess": posterior.ess,
        "method": posterior.method.astype(str),
        "flag": posterior.flag.astype(str),
        **groups.get("constant_data", {}),
    }
    dims |= {name: task for name in ("khat", "relative_ess", "method", "flag")}
    remark = "draw s of all tasks is one joint draw" if posterior.joint else "tasks were inferred independently"
    return export(groups, dims=dims, coords={task[0]: list(tasks.names)}, attrs={"draws": remark})


def _data_groups(posterior: Results, dims: dict[str, list[str]]) -> dict[str, dict[str, np.ndarray]]:
    """What concerns rows: predictions, log likelihood and data, with NaN where a task has fewer rows."""
    density, tasks = posterior.density, posterior.tasks
    paired = posterior.paired()
    predictive: dict[str, np.ndarray] = {}
    likelihood: dict[str, np.ndarray] = {}
    if max(tasks.sizes) == 0:
        return {}
    for site in density.structure.outcomes:
        if site not in density.structure.coupled:
            predictive[site] = predict(density, tasks, paired, site=site, seed=posterior.seed).draws[None]
            likelihood[site] = log_rows(density, tasks, paired, site=site)[None]
            extra = [f"{site}_dim_{i}" for i in range(predictive[site].ndim - 4)]
            dims[site] = [density.schema.task, "row", *extra]
    batch = tasks.batch(np.arange(len(tasks)))
    mask = batch.mask.numpy()
    groups = {"posterior_predictive": predictive, "log_likelihood": likelihood}
    observed = _masked(batch.y.numpy(), mask)
    single = next(iter(predictive), None) if len(predictive) == 1 else None
    groups["observed_data"] = {single or "y": observed}
    dims.setdefault("y", [density.schema.task, "row", *[f"y_dim_{i}" for i in range(observed.ndim - 2)]])
    if batch.x.numel():
        groups["constant_data"] = {"x": _masked(batch.x.numpy(), mask)}
        dims["x"] = [density.schema.task, "row", *[f"x_dim_{i}" for i in range(batch.x.dim() - 2)]]
    return {name: group for name, group in groups.items() if group}


def _masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask.reshape(mask.shape + (1,) * (values.ndim - 2)), values, np.nan)
