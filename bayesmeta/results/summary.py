"""A posterior as a table and as an ArviZ object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.results.arviz_export import DATA
from bayesmeta.results.arviz_export import to_arviz as export
from bayesmeta.results.prediction import Draws, log_rows, predict

LEVELS = (0.05, 0.5, 0.95)


class Results(Protocol):
    """What a table or an export needs to know of a posterior (`results/posterior.py`)."""

    density: TaskDensity
    tasks: Tasks
    seed: int
    joint: bool
    chains: int
    chain_stats: dict[str, np.ndarray]
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

    def prior(self) -> dict[str, np.ndarray]:
        """Draws of the learned prior."""

    def log_weight(self) -> np.ndarray:
        """Log weights of the chosen candidates."""


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
    """Groups posterior, posterior_predictive, log_likelihood, observed_data, constant_data, prior and sample_stats.

    `prior` holds draws of the learned prior at the same θ; `sample_stats` the log weight of each draw's candidate, and
    where the draws are those of chains their diagnostics. Sites that couple the rows of a task, as in Gaussian
    processes, are left out of `posterior_predictive` and `log_likelihood`, whose entries are of single rows.
    """
    task = [posterior.density.schema.task]
    dims: dict[str, list[str]] = {"log_weight": task}
    groups = {"posterior": _draw_group(posterior, dims)}
    groups["prior"] = posterior.prior()
    groups["sample_stats"] = {"log_weight": posterior.log_weight()}
    if posterior.chains and posterior.joint:
        groups["sample_stats"] |= {name: values.reshape(-1) for name, values in posterior.chain_stats.items()}
    if max(posterior.tasks.sizes) > 0:
        groups |= _data_groups(posterior, dims) | _row_groups(posterior, dims)
    groups["constant_data"] = _diagnostics(posterior, dims) | groups.get("constant_data", {})
    remark = "draw s of all tasks is one joint draw" if posterior.joint else "tasks were inferred independently"
    filled = {name: _by_chain(name, group, posterior.chains) for name, group in groups.items() if group}
    return export(filled, dims=dims, coords={task[0]: list(posterior.tasks.names)}, attrs={"draws": remark})


def _by_chain(group: str, arrays: dict[str, np.ndarray], chains: int) -> dict[str, np.ndarray]:
    """Draws `(draw, …)` as `(chain, draw, …)`; data as they are."""
    if group in DATA:
        return arrays
    return {name: values.reshape(max(1, chains), -1, *values.shape[1:]) for name, values in arrays.items()}


def _draw_group(posterior: Results, dims: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Draws of task parameters and of θ, the latter a task where the draws are not joint."""
    task = [posterior.density.schema.task]
    sampled = {name: posterior.draws(name) for name in posterior.sites}
    dims |= {name: task + _further(name, values.ndim - 2) for name, values in sampled.items()}
    shared = dict(posterior.shared)
    lead = [] if posterior.joint else task
    dims |= {name: lead + _further(name, values.ndim - 1 - len(lead)) for name, values in shared.items()}
    return sampled | shared


def _diagnostics(posterior: Results, dims: dict[str, list[str]]) -> dict[str, np.ndarray]:
    found = {
        "khat": posterior.khat,
        "relative_ess": posterior.ess,
        "method": posterior.method.astype(str),
        "flag": posterior.flag.astype(str),
    }
    dims |= {name: [posterior.density.schema.task] for name in found}
    return found


def _further(name: str, count: int) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(count)]


def _row_groups(posterior: Results, dims: dict[str, list[str]]) -> dict[str, dict[str, np.ndarray]]:
    """Predictions and log likelihood of the observed rows, with NaN where a task has fewer rows."""
    density, tasks, paired = posterior.density, posterior.tasks, posterior.paired()
    predictive: dict[str, np.ndarray] = {}
    likelihood: dict[str, np.ndarray] = {}
    for site in density.structure.outcomes:
        if site not in density.structure.coupled:
            predictive[site] = predict(density, tasks, paired, site=site, seed=posterior.seed).draws
            likelihood[site] = log_rows(density, tasks, paired, site=site)
            dims[site] = _row_dims(posterior, site, predictive[site].ndim - 3)
    return {"posterior_predictive": predictive, "log_likelihood": likelihood}


def _data_groups(posterior: Results, dims: dict[str, list[str]]) -> dict[str, dict[str, np.ndarray]]:
    """The tasks' own rows; labels take the name of the observed site where there is one."""
    batch = posterior.tasks.batch(np.arange(len(posterior.tasks)))
    sites = posterior.density.structure.outcomes
    label = sites[0] if len(sites) == 1 else "y"
    groups = {"observed_data": {label: _masked(batch.y.numpy(), batch.mask.numpy())}}
    dims[label] = _row_dims(posterior, label, batch.y.dim() - 2)
    groups["constant_data"] = _covariates(posterior, batch, dims)
    return groups


def _covariates(posterior: Results, batch: Batch, dims: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """x, columns and task columns; text as its codes."""
    schema, mask = posterior.density.schema, batch.mask.numpy()
    rows = {"x": batch.x} if batch.x.numel() else {}
    rows |= {name: batch[name] for name in schema.columns}
    dims |= {name: _row_dims(posterior, name, values.dim() - 2) for name, values in rows.items()}
    tasks = {name: batch[name].squeeze(1).numpy() for name in schema.task_columns}
    dims |= {name: [schema.task, *_further(name, values.ndim - 1)] for name, values in tasks.items()}
    return {name: _masked(values.numpy(), mask) for name, values in rows.items()} | tasks


def _row_dims(posterior: Results, name: str, further: int) -> list[str]:
    return [posterior.density.schema.task, "row", *_further(name, further)]


def _masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask.reshape(mask.shape + (1,) * (values.ndim - 2)), values, np.nan)
