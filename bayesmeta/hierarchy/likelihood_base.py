"""What a likelihood is: the interface, the door for plain functions, and the parts that the built-in ones share.

The built-in likelihoods are in ``likelihoods.py``; the observed site is sampled in ``model.py``.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.binding import bind, in_default_dtype

Source = float | str


class Requirement(NamedTuple):
    """Something the data must satisfy: `ok` and `values` have one entry a row, `expected` says it in words."""

    source: str
    values: Tensor
    ok: Tensor
    expected: str


class Observation(NamedTuple):
    """An observed site: its name, what distribution its labels have, and the batch that holds them."""

    site: str
    outcome: Distribution | Tensor
    batch: Batch


class Likelihood(abc.ABC):
    """p(y | f, θ); override `distribution`, and `shared` and `requirements` where there is something to say."""

    sites: tuple[str, ...] = ("y",)
    """Names of the observed sites."""
    width: int | None = 1
    """Numbers of f that a row takes; None where nothing is said of it."""

    @property
    def shared(self) -> dict[str, Distribution]:
        """Priors of the likelihood's own shared parameters, by site name; none by default."""
        return {}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules with weights to be trained, by name; none by default."""
        return {}

    @abc.abstractmethod
    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution | Tensor:
        """Distribution of the labels.

        Args:
            f: the predictor's value, `(T, N, *k)`.
            batch: the tasks, for columns.
            shared: values of all shared parameters.

        Returns:
            A distribution of batch shape `(T, N)`, or a tensor `(T, N)` of log likelihoods.
        """

    def observe(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Iterator[Observation]:
        """The observed sites; one by default, `y`."""
        yield Observation("y", self.distribution(f, batch, shared), batch)

    def labels(self, site: str, batch: Batch) -> Batch:
        """The batch with what a site observes as its labels, other rows masked."""
        return batch

    def assemble(self, outcomes: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Labels of a batch from simulated outcomes of all sites, `(T, N, *dy)`."""
        (outcome,) = outcomes.values()
        return outcome

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """What the data must satisfy; nothing by default."""
        return iter(())

    def check(self, tasks: Tasks) -> None:
        """Refuses labels and columns outside the support; reads values, so it is never called inside the model.

        Raises:
            ValueError: with the first task that breaks a requirement.
        """
        for need in self.requirements(tasks):
            bad = (~need.ok).nonzero().reshape(-1)
            if len(bad):
                row = int(bad[0])
                task = task_of_row(tasks, row)
                raise ValueError(
                    f"{type(self).__name__} likelihood: expected {need.source} {need.expected}, got "
                    f"{need.values[row].item():g} in task {task!r} ({len(bad)} of {len(need.ok)} rows are outside the "
                    "support); correct or drop these rows, or choose a likelihood with another support"
                )


def task_of_row(tasks: Tasks, row: int) -> str:
    """The name of the task that a row belongs to."""
    return tasks.names[int(torch.searchsorted(tasks.offsets, row, right=True)) - 1]


def labels(tasks: Tasks, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """One label a row, and whether it is missing."""
    if tasks.schema.y_shape != ():
        raise ValueError(_several_outputs(type(likelihood).__name__, tasks.schema.y_shape))
    return tasks.y, ~tasks.observed


def rows(tasks: Tasks, source: Source, like: Tensor) -> Tensor:
    """A column, a task column or a number as one value a row."""
    if not isinstance(source, str):
        return torch.full_like(like, source, dtype=torch.float64)
    if source in tasks.columns:
        return tasks.columns[source]
    if source in tasks.task_columns:
        return tasks.task_columns[source].repeat_interleave(tasks.offsets.diff())
    known = [*tasks.columns, *tasks.task_columns]
    raise ValueError(f"likelihood: unknown column {source!r}; known: {known}; name it in columns= or task_columns=")


def positive(tasks: Tasks, source: Source, like: Tensor) -> Iterator[Requirement]:
    """Requires a column to be finite and positive."""
    if isinstance(source, str):
        values = rows(tasks, source, like)
        yield Requirement(f"column {source!r}", values, (values > 0) & values.isfinite(), "finite and > 0")


def counts(y: Tensor, missing: Tensor, levels: int | None = None) -> Requirement:
    """Requires whole numbers ≥ 0, and below `levels`."""
    whole = (y >= 0) & (y == y.round())
    if levels is None:
        return Requirement("y", y, whole | missing, "as a count, 0, 1, 2, …")
    return Requirement("y", y, (whole & (y < levels)) | missing, f"as a level, 0 … {levels - 1}")


def value(batch: Batch, source: Source) -> Tensor | float:
    """A number as it is; a column in the dtype of the call."""
    return batch[source].to(torch.get_default_dtype()) if isinstance(source, str) else source


def rowwise(f: Tensor, batch: Batch, likelihood: Likelihood, *, levels: int | Literal["K"] | None = None) -> Tensor:
    """`f` expanded to the rows, refused if its shape would broadcast into something else."""
    name, (t, n) = type(likelihood).__name__, batch.mask.shape
    tail: tuple[int | str, ...] = () if levels is None else (levels,)
    if not _is_rowwise(f, t, n, tail):
        wanted = ", ".join(str(size) for size in (t, n, *tail))
        raise ValueError(
            f"{name} likelihood: expected f = predictor(phi, x) of shape ({wanted}): {t} tasks, {n} rows"
            f"{'' if levels is None else ', levels'}; got {tuple(f.shape)}; index or sum over the last dimension"
        )
    if batch.y.dim() != 2:
        raise ValueError(_several_outputs(name, tuple(batch.y.shape[2:])))
    return f.expand(t, n, *f.shape[2:])


def _is_rowwise(f: Tensor, t: int, n: int, tail: tuple[int | str, ...]) -> bool:
    if f.dim() != 2 + len(tail) or (tail != ("K",) and tuple(f.shape[2:]) != tail):
        return False
    return f.shape[0] in (1, t) and f.shape[1] in (1, n)


def _several_outputs(name: str, shape: tuple[int, ...]) -> str:
    return (
        f"{name} likelihood: expected one output, got labels of shape {shape}; write the likelihood as a function that "
        f"returns a distribution of event shape {shape}"
    )


def require_positive(likelihood: Likelihood, **numbers: Any) -> None:
    """Refuses an option that is no finite positive number."""
    for name, value in numbers.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"{type(likelihood).__name__}: expected {name} as a finite number > 0, got {value!r}")


def require_source(likelihood: Likelihood, **sources: Any) -> None:
    """Refuses an option that is neither a positive number nor the name of a column."""
    require_positive(likelihood, **{name: value for name, value in sources.items() if not isinstance(value, str)})


def require_levels(likelihood: Likelihood, levels: int | None) -> None:
    """Refuses a number of levels below 2; None is nobody's number."""
    if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 2):
        raise ValueError(f"{type(likelihood).__name__}: expected levels as an integer ≥ 2, got {levels!r}")


@final
@dataclass(frozen=True)
class Custom(Likelihood):
    """A likelihood written as a function of any of `(f, batch, shared)`, bound by name.

    Args:
        function: returns a torch or Pyro distribution of batch shape `(T, N)`; or one of event shape `(N,)` and batch
            shape `(T, 1)` where the rows of a task are coupled; or a tensor `(T, N)` of log likelihoods.
        priors: parameters of its own that all tasks share, by name; the function finds their values in `shared`.
    """

    function: Callable[..., Any]
    priors: Mapping[str, Distribution] = dataclasses.field(default_factory=dict, hash=False)
    _bound: Callable[..., Any] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.function, Distribution):
            raise ValueError(
                "likelihood: expected a function of (f, batch, shared), got a distribution; wrap it in one"
            )
        if not isinstance(self.priors, Mapping):
            raise ValueError(f"likelihood: expected priors as distributions by name, got {self.priors!r}")
        for name, prior in self.priors.items():
            if not (isinstance(name, str) and name):
                raise ValueError(f"likelihood: expected a name for each of priors, got {name!r}")
            if not isinstance(prior, Distribution):
                raise ValueError(f"likelihood: expected priors[{name!r}] as a distribution, got {prior!r}")
        object.__setattr__(self, "priors", dict(self.priors))
        bound = bind(self.function, role="likelihood", names=("f", "batch", "shared"))
        object.__setattr__(self, "_bound", bound)

    @property
    def shared(self) -> dict[str, Distribution]:
        """The parameters of its own."""
        return {name: in_default_dtype(prior) for name, prior in self.priors.items()}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The function, if it is one."""
        return {"likelihood": self.function} if isinstance(self.function, nn.Module) else {}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Any:
        """What the function returns; ``model.py`` checks it."""
        return self._bound(f=f, batch=batch, shared=shared)


def as_likelihood(likelihood: Likelihood | Callable[..., Any]) -> Likelihood:
    """Returns `likelihood` itself, or the function it is as a `Custom` likelihood."""
    if isinstance(likelihood, type) and issubclass(likelihood, Likelihood):
        raise ValueError(
            f"likelihood: expected an object, got the class {likelihood.__name__}; call it: {likelihood.__name__}()"
        )
    return likelihood if isinstance(likelihood, Likelihood) else Custom(likelihood)
