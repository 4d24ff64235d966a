"""Several likelihoods in one model: one for each output, or one for each kind of rows.

Each observes a site of its own and brings its shared parameters under names of their own, `sigma_<site>`.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Never, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy import whitening
from bayesmeta.hierarchy.binding import as_pyro
from bayesmeta.hierarchy.likelihood_base import Likelihood, Observation, as_likelihood, rows, task_of_row


class _Several(Likelihood, abc.ABC):
    """What likelihoods of several sites have in common."""

    parts: dict[str, Likelihood]

    @property
    def sites(self) -> tuple[str, ...]:  # type: ignore[override]
        """One a likelihood."""
        return tuple(self.parts)

    @property
    def shared(self) -> dict[str, Distribution]:
        """Those of all likelihoods, each with the name of its site behind its own."""
        return {f"{name}_{site}": fn for site, part in self.parts.items() for name, fn in part.shared.items()}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those of all likelihoods, one that several have in common once."""
        named = [(f"{name}_{site}", m) for site, part in self.parts.items() for name, m in part.modules.items()]
        first = {id(module): name for name, module in reversed(named)}
        return {name: module for name, module in named if first[id(module)] == name}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Never:
        """There is one a site: see `observe`."""
        raise TypeError(f"{type(self).__name__} has a distribution for each of {list(self.sites)}; call observe")

    def _own(self, site: str, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        values: Any = copy.copy(shared)
        values.update({name: shared[f"{name}_{site}"] for name in self.parts[site].shared})
        return values  # type: ignore[no-any-return]


def _refuse_common_names(owner: str, parts: Mapping[str, Likelihood]) -> None:
    names = [f"{name}_{site}" for site, part in parts.items() for name in part.shared]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{owner}: expected parameters whose names differ with that of their site behind them, got {twice} twice; "
            "rename them in priors="
        )


def _parts(owner: str, given: Mapping[Any, Any], site_of: Callable[[Any], str]) -> dict[str, Likelihood]:
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{owner}: expected likelihoods by name, {{name: likelihood}}, got {given!r}")
    found = {site_of(key): as_likelihood(likelihood) for key, likelihood in given.items()}
    nested = [site for site, part in found.items() if isinstance(part, _Several)]
    if len(found) < len(given) or nested:
        raise ValueError(f"{owner}: expected one plain likelihood for each of {list(given)}, got {given!r}")
    _refuse_common_names(owner, found)
    return found


@final
@dataclass(frozen=True)
class Outputs(_Several):
    """A likelihood for each output of y `(T, N, k)`; labels may be missing for some (`missing="mask"`).

    f has the numbers of all likelihoods side by side, in their order: one each, K for `Categorical(levels=K)`. The
    observed sites are called as the outputs are, `y0`, `y1`, … for outputs given by position.

    Args:
        by_output: A likelihood for each output that is modelled, by name or position.
    """

    by_output: Mapping[str | int, Any]
    parts: dict[str, Likelihood] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = _parts("Outputs", self.by_output, lambda key: f"y{key}" if isinstance(key, int) else str(key))
        unknown = [site for site, part in found.items() if part.width is None]
        if any(isinstance(key, int) and key < 0 for key in self.by_output):
            raise ValueError(f"Outputs: expected outputs counted from 0, got {list(self.by_output)}")
        if unknown:
            raise ValueError(
                f"Outputs: expected likelihoods that say how many numbers of f they take, got {unknown} without; give "
                "Categorical its levels"
            )
        object.__setattr__(self, "parts", found)

    @property
    def width(self) -> int:  # type: ignore[override]
        """Of all likelihoods together."""
        return sum(part.width or 0 for part in self.parts.values())

    def observe(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Iterator[Observation]:
        """One site an output, on the rows where it is observed."""
        if f.dim() != 3 or f.shape[-1] != self.width:
            raise ValueError(
                f"Outputs likelihood: expected f = predictor(phi, x) of shape (T, N, {self.width}), the numbers of "
                f"{list(self.sites)} side by side, got {tuple(f.shape)}"
            )
        pieces = f.split([part.width or 0 for part in self.parts.values()], -1)
        for key, (site, part), piece in zip(self.by_output, self.parts.items(), pieces, strict=True):
            one = batch.only(key)
            value = piece.squeeze(-1) if part.width == 1 else piece
            yield Observation(site, part.distribution(value, one, self._own(site, shared)), one)

    def labels(self, site: str, batch: Batch) -> Batch:
        """The batch with the site's output."""
        return batch.only(dict(zip(self.parts, self.by_output, strict=True))[site])

    def assemble(self, outcomes: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Every output in its place; those that are not modelled stay as they are."""
        y = batch.y.to(torch.get_default_dtype()).clone()
        for key, site in zip(self.by_output, self.parts, strict=True):
            y[:, :, batch.schema.output(key)] = outcomes[site].to(y.dtype)
        return y

    def check(self, tasks: Tasks) -> None:
        """Refuses an output with two likelihoods, and labels that lie outside an output's support."""
        taken = [tasks.schema.output(key) for key in self.by_output]
        if len(set(taken)) < len(taken):
            raise ValueError(f"Outputs: expected one likelihood for each output, got {list(self.by_output)}")
        for key, (site, part) in zip(self.by_output, self.parts.items(), strict=True):
            try:
                part.check(tasks.only(key))
            except ValueError as error:
                raise ValueError(f"output {site!r}: {error}") from error


@final
@dataclass(frozen=True)
class Kinds(_Several):
    """A likelihood for each kind of rows or tasks, as a column says; f is the same, on each likelihood's own scale.

    The observed sites are called `y_<level>`.

    Args:
        column: A column or task column.
        by_level: A likelihood for each of its levels (text) or numbers.
    """

    column: str
    by_level: Mapping[str | int, Any]
    parts: dict[str, Likelihood] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = _parts("Kinds", self.by_level, lambda level: f"y_{level}")
        if len({part.width for part in found.values()}) > 1:
            raise ValueError(f"Kinds: expected likelihoods that take equally many numbers of f, got {self.by_level!r}")
        object.__setattr__(self, "parts", found)

    @property
    def width(self) -> int | None:  # type: ignore[override]
        """Of every likelihood."""
        return next(iter(self.parts.values())).width

    def observe(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Iterator[Observation]:
        """One site a kind, on its rows."""
        for level, (site, part) in zip(self.by_level, self.parts.items(), strict=True):
            some = batch.where(self.column, level)
            outcome = part.distribution(f, some, self._own(site, shared))
            yield Observation(site, outcome, _inside(some, outcome))

    def labels(self, site: str, batch: Batch) -> Batch:
        """The batch with the rows of the site's kind."""
        return batch.where(self.column, dict(zip(self.parts, self.by_level, strict=True))[site])

    def assemble(self, outcomes: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Every row from the site of its kind."""
        y = batch.y.to(torch.get_default_dtype())
        for site in self.parts:
            y = torch.where(self.labels(site, batch).mask, outcomes[site].to(y.dtype), y)
        return y

    def check(self, tasks: Tasks) -> None:
        """Refuses kinds without a likelihood, and labels outside the support of their kind's."""
        kind = rows(tasks, self.column, tasks.y)
        codes = {level: tasks.schema.code(self.column, level) for level in self.by_level}
        known = torch.stack([kind == code for code in codes.values()]).any(0)
        if not bool(known.all()):
            row = int((~known).nonzero()[0])
            name = task_of_row(tasks, row)
            levels = tasks.schema.levels.get(self.column)
            came = levels[int(kind[row])] if levels else kind[row].item()
            raise ValueError(
                f"Kinds: expected {self.column!r} among {list(self.by_level)}, got {came!r} in task "
                f"{name!r}; give a likelihood for it, or drop these rows"
            )
        for level, part in zip(self.by_level, self.parts.values(), strict=True):
            part.check(tasks.split_rows(kind == codes[level])[0])


def _inside(batch: Batch, outcome: Distribution | Tensor) -> Batch:
    """The batch with labels of masked rows inside the support of a distribution, for handlers that check them."""
    if isinstance(outcome, Tensor):
        return batch
    labels: Any = as_pyro(outcome, role="likelihood")
    safe = whitening.interior(whitening.support(labels), labels.shape())
    if safe is None:
        return batch
    y = torch.where(batch.mask, batch.y, safe.to(batch.y.dtype).reshape(safe.shape[:2]))
    return batch.replace({**batch.tensors, "y": y})
