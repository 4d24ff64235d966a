"""Reading an ordinary Pyro model: one pass gives every site its value and collects the log densities.

`trace_model` runs the user's function on one batch under one handler, with one θ and one value a task; what a latent
site becomes is decided by a `Latents` strategy, what an observed site does by `outcome`. This file and `density.py`
are the only ones that see Pyro messages.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from bayesmeta.data.batch import Batch
from bayesmeta.hierarchy import whitening
from bayesmeta.hierarchy.recording import Captured

Model = Callable[[Batch], Any]

_SUBSAMPLED = (
    "plate {name!r} subsamples {part} of {size}, which would silently change the density; drop subsample_size and "
    "subsample, bayesmeta draws mini-batches of tasks itself"
)


@dataclass(frozen=True)
class Site:
    """A latent site, shapes without the leading (T, 1). `even`: log of |t|, prior even; `positive`: like a scale."""

    name: str
    shape: tuple[int, ...]
    unconstrained: tuple[int, ...]
    kind: str
    improper: bool = False
    even: bool = False
    positive: bool = False

    @property
    def size(self) -> int:
        """How many unconstrained coordinates the site has (of one task)."""
        return math.prod(self.unconstrained)


@dataclass(frozen=True)
class ObservedSite:
    """An observed site: inside `observations()` or not, a `pyro.factor` or not, its event shape."""

    name: str
    in_rows: bool
    factor: bool
    event: tuple[int, ...]
    shared: bool


@dataclass
class Learned:
    """Point estimates that the model registers: the fit's own copies, and what they stand in for."""

    values: dict[str, Tensor] = field(default_factory=dict)
    constraints: dict[str, Any] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    buffers: dict[int, Tensor] = field(default_factory=dict)


class Latents(Protocol):
    """Decides the value of each latent site and its log density in its own coordinates."""

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Value, log density of the value, log Jacobian."""

    def task(self, name: str, fn: dist.TorchDistribution, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Value, log density of the value `(T, 1)`, log Jacobian `(T, 1)`; `plain`: not scaled, not masked."""


@dataclass
class Trace:
    """What one pass of the model gave."""

    tasks: int
    values: dict[str, Tensor] = field(default_factory=dict)
    task_values: dict[str, Tensor] = field(default_factory=dict)
    shared_prior: Tensor = field(default_factory=lambda: torch.zeros(()))
    task_prior: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    outcomes: dict[str, Tensor] = field(default_factory=dict)
    normals: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    latent: list[tuple[str, bool, dist.TorchDistribution]] = field(default_factory=list)
    observed: list[ObservedSite] = field(default_factory=list)

    def kept_rows(self) -> dict[str, Tensor]:
        """Log likelihood of each row and site `(T, N)`, NaN where the site's mask leaves the row out."""
        return {
            name: torch.where(self.kept[name], rows, math.nan) if name in self.kept else rows
            for name, rows in self.rows.items()
        }

    def log_prior(self) -> Tensor:
        """Log prior density of each task's parameters, `(T,)`."""
        return self._total(self.task_prior)

    def log_likelihood(self) -> Tensor:
        """Log likelihood of each task's data, `(T,)`."""
        return self._total(self.rows)

    def log_task(self) -> Tensor:
        """Log joint density of each task's parameters and data, `(T,)`."""
        return self.log_prior() + self.log_likelihood()

    def _total(self, terms: dict[str, Tensor]) -> Tensor:
        return torch.stack([t.sum(-1) for t in terms.values()]).sum(0) if terms else torch.zeros(self.tasks)


def trace_model(
    model: Model, batch: Batch, latents: Latents, learned: Learned, *, dtype: torch.dtype, outcome: str = "score"
) -> tuple[Trace, Captured]:
    """Runs a model once.

    Args:
        model: The user's function.
        batch: Its argument.
        latents: Gives the latent sites their values.
        learned: The fit's copies of registered parameters; new ones are added.
        dtype: Floating dtype that captured tensors are promoted to (also the default dtype of the caller's context).
        outcome: What observed sites do: "score", "sample", "mean", "support", or "normal" (location, Cholesky
            factor and data of multivariate normal ones are kept).
    """
    handler = _Handler(latents, learned, len(batch.names), dtype, outcome)
    with handler.captured, handler:
        model(batch)
    return handler.trace, handler.captured


class _Handler(Messenger):
    """The outermost handler: it sees a site after plates, masks and scales have worked on it."""

    def __init__(self, latents: Latents, learned: Learned, tasks: int, dtype: torch.dtype, outcome: str) -> None:
        super().__init__()
        self.trace = Trace(tasks)
        self._latents, self._learned, self._dtype, self._outcome = latents, learned, dtype, outcome
        self._replacements = {id(t): learned.values[n] for n, t in learned.originals.items()} | learned.buffers
        self.captured = Captured(self._replacements, dtype)
        self._seen: set[str] = set()

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name, init = msg["args"][0], msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor")
        if name not in self._learned.values:
            constraint = msg["args"][2] if len(msg["args"]) > 2 else msg["kwargs"].get("constraint", constraints.real)
            self._register(name, init() if callable(init) else init, constraint)
        value = self._learned.values[name]
        msg["value"] = transform_to(self._learned.constraints[name])(value)

    def _register(self, name: str, init: Tensor | None, constraint: Any) -> None:
        if init is None:
            raise ValueError(f"pyro.param {name!r} has no initial value; give one: pyro.param({name!r}, init_tensor)")
        learned = self._learned
        with torch._C.DisableTorchFunction():
            value = transform_to(constraint).inv(init.detach().to(self._dtype)).clone()
        learned.values[name], learned.constraints[name] = value, constraint
        learned.originals[name] = init
        if "$$$" in name:
            self._replacements[id(init)] = value
            self._register_module(name.split("$$$")[0])

    def _register_module(self, name: str) -> None:
        module = _module_being_registered()
        if module is None or name in self._learned.modules:
            return
        self._learned.modules[name] = module
        with torch._C.DisableTorchFunction():
            for buffer in module.buffers():
                copy = buffer.detach().clone()
                self._learned.buffers[id(buffer)] = copy.to(self._dtype) if copy.is_floating_point() else copy
        self._replacements.update(self._learned.buffers)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"] = whitening.unvalidated(msg["fn"])
        if isinstance(fn, _Subsample):
            _check_plate(msg["name"], fn)
            return
        plates = {frame.name for frame in msg["cond_indep_stack"]}
        self._check_name(msg["name"])
        _check_frames(msg["name"], msg["cond_indep_stack"])
        if _is_deterministic(msg):
            self._store(msg["name"], msg["value"], plates)
        elif msg["is_observed"]:
            self._observe(msg, plates)
        elif isinstance(fn, dist.Delta):
            self._fix(msg, plates)
        else:
            self._draw(msg, plates)

    def _check_name(self, name: str) -> None:
        if name in self._seen:
            raise ValueError(f"two sites are named {name!r}; give each its own name")
        self._seen.add(name)

    def _store(self, name: str, value: Tensor, plates: set[str]) -> None:
        if "obs" not in plates:
            (self.trace.task_values if "task" in plates else self.trace.values)[name] = value

    def _fix(self, msg: dict[str, Any], plates: set[str]) -> None:
        """A latent site with one possible value: deterministic."""
        msg["value"] = msg["fn"].v
        self._store(msg["name"], msg["value"], plates)

    def _draw(self, msg: dict[str, Any], plates: set[str]) -> None:
        name, fn = msg["name"], msg["fn"]
        in_tasks = "task" in plates
        _check_latent(name, fn, plates)
        if in_tasks:
            _check_task_site(name, fn, plates, self.trace.tasks)
        self.trace.latent.append((name, in_tasks, fn))
        plain = msg["mask"] is None and isinstance(msg["scale"], (int, float)) and msg["scale"] == 1
        if in_tasks:
            value, log_prob, log_jacobian = self._latents.task(name, fn, plain)
        else:
            value, log_prob, log_jacobian = self._latents.shared(name, fn)
        terms = scale_and_mask(log_prob, msg["scale"], msg["mask"]) + log_jacobian
        if in_tasks:
            self.trace.task_prior[name] = terms.expand(self.trace.tasks, 1)
        else:
            self.trace.shared_prior = self.trace.shared_prior + terms.sum()
        msg["value"] = value
        self._store(name, value, plates)

    def _observe(self, msg: dict[str, Any], plates: set[str]) -> None:
        name, fn = msg["name"], msg["fn"]
        factor = isinstance(fn, dist.Unit)
        in_tasks = "task" in plates
        self.trace.observed.append(ObservedSite(name, "obs" in plates, factor, tuple(fn.event_shape), not in_tasks))
        outcome = "score" if factor or not in_tasks else self._outcome
        if outcome in _PREDICT:
            msg["value"] = self.trace.outcomes[name] = _PREDICT[outcome](name, fn)
            return
        if outcome == "normal":
            msg["value"] = self._normal(name, fn, msg["value"])
            return
        value = msg["value"] if factor else cast_observed(fn, msg["value"])
        if outcome == "support":
            self._check_support(name, fn, value, msg["mask"])
        elif in_tasks:
            self._score_rows(msg, value, None if factor else _kept(fn, msg["mask"]))
        else:
            self.trace.shared_prior = self.trace.shared_prior + _score(msg, value).sum()

    def _score_rows(self, msg: dict[str, Any], value: Tensor, kept: Tensor | None) -> None:
        if kept is not None:
            self.trace.kept[msg["name"]] = kept
        self.trace.rows[msg["name"]] = _task_first(msg["name"], _score(msg, value), self.trace.tasks)

    def _normal(self, name: str, fn: dist.TorchDistribution, value: Tensor) -> Tensor:
        if not isinstance(fn, (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)):
            return value
        self.trace.normals[name] = (fn.loc, fn.scale_tril, cast_observed(fn, value))
        return fn.loc

    def _check_support(self, name: str, fn: dist.TorchDistribution, value: Tensor, mask: Any) -> None:
        support = whitening.support(fn)
        inside = support.check(value) | whitening.has_graded_bounds(support)
        kept = _kept(fn, mask)
        inside = inside if kept is None else inside | ~kept
        self.trace.outcomes[name] = inside.expand(torch.broadcast_shapes(inside.shape, (self.trace.tasks, 1)))


def _is_deterministic(msg: dict[str, Any]) -> bool:
    """`pyro.deterministic`, or what a reparametrised site became."""
    fn = msg["fn"]
    masked = isinstance(fn, dist.MaskedDistribution) and fn._mask is False and isinstance(fn.base_dist, dist.Delta)
    return bool(masked and msg["is_observed"])


def _score(msg: dict[str, Any], value: Tensor) -> Tensor:
    fn = msg["fn"]
    kept = None if isinstance(fn, dist.Unit) else _kept(fn, msg["mask"])
    value = value if kept is None else _inside(fn, value, kept)
    return scale_and_mask(fn.log_prob(value), msg["scale"], msg["mask"])


def _kept(fn: dist.TorchDistribution, mask: Any) -> Tensor | None:
    """Where a site counts: the masks of its contexts and of its own distribution; None: everywhere."""
    own = fn._mask if isinstance(fn, dist.MaskedDistribution) else None
    masks = [m for m in (mask, own) if m is not None and m is not True]
    return torch.as_tensor(functools.reduce(lambda a, b: a & b, masks)) if masks else None


def _inside(fn: dist.TorchDistribution, value: Tensor, kept: Tensor) -> Tensor:
    """Moves masked values into the support: outside of it a density is NaN, and 0 × NaN is NaN in a gradient."""
    support = whitening.support(fn)
    safe = whitening.interior(support, fn.shape())
    if safe is None:
        return value
    usable = support.check(value) | kept
    return torch.where(usable.reshape(*usable.shape, *[1] * fn.event_dim), value, safe.to(value.dtype))


def _task_first(name: str, terms: Tensor, tasks: int) -> Tensor:
    if terms.dim() != 2 or terms.shape[0] != tasks:
        raise ValueError(
            f"observed site {name!r}: expected a log density of shape ({tasks}, rows) or ({tasks}, 1), one line a "
            f"task, got {tuple(terms.shape)}; give every further dimension to the event with .to_event(...)"
        )
    return terms


def cast_observed(fn: dist.TorchDistribution, value: Any) -> Tensor:
    """Observed values in the dtype their distribution wants: integers become floating but for categories."""
    base = fn
    while hasattr(base, "base_dist") and not isinstance(base, torch.distributions.TransformedDistribution):
        base = base.base_dist
    if isinstance(base, torch.distributions.Categorical):
        return torch.as_tensor(value).long()
    return torch.as_tensor(value).to(torch.get_default_dtype())


def _mean(name: str, fn: dist.TorchDistribution) -> Tensor:
    base = fn
    while hasattr(base, "base_dist") and not isinstance(base, torch.distributions.TransformedDistribution):
        base = base.base_dist
    if isinstance(base, torch.distributions.Categorical):
        raise ValueError(f"site {name!r} is categorical and has no mean; use kind='outcome'")
    try:
        return fn.mean
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"site {name!r}: {type(base).__name__} gives no mean; use kind='outcome'") from error


_PREDICT: dict[str, Callable[[str, dist.TorchDistribution], Tensor]] = {
    "sample": lambda name, fn: whitening.draw(fn),
    "mean": _mean,
}


def _check_plate(name: str, fn: _Subsample) -> None:
    if fn.subsample_size is not None and fn.subsample_size < fn.size:
        raise ValueError(_SUBSAMPLED.format(name=name, part=fn.subsample_size, size=fn.size))


def _check_frames(name: str, stack: tuple[Any, ...]) -> None:
    for frame in stack:
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(_SUBSAMPLED.format(name=frame.name, part=frame.size, size=frame.full_size))


def _check_latent(name: str, fn: dist.TorchDistribution, plates: set[str]) -> None:
    if "obs" in plates:
        raise ValueError(
            f"latent site {name!r} is inside batch.observations(), one value a row; sample it in batch.tasks() as a "
            "vector (.to_event(1)) and index it by a column, or integrate it into the likelihood "
            "(labels that are missing: missing='mask', not obs_mask)"
        )
    support = whitening.support(fn)
    if fn.has_enumerate_support or support.is_discrete:
        raise ValueError(f"latent site {name!r} is discrete ({type(fn).__name__}); sum it out of the likelihood")
    try:
        whitening.bijection(fn)
    except NotImplementedError as error:
        raise ValueError(
            f"latent site {name!r}: no smooth map from real numbers onto its support {support} is known; sample a "
            "vector with a simpler support (LKJCholesky for a correlation) and transform it"
        ) from error


def _check_task_site(name: str, fn: dist.TorchDistribution, plates: set[str], tasks: int) -> None:
    others = sorted(plates - {"task"})
    if others:
        raise ValueError(
            f"task site {name!r} is inside further plates {others}; use .expand([...]).to_event(...) in their place"
        )
    if whitening.is_improper(fn):
        raise ValueError(f"task site {name!r} has an improper prior; give it a proper one (only shared sites may)")
    if tuple(fn.batch_shape) != (tasks, 1):
        raise ValueError(
            f"task site {name!r}: expected one value a task, batch shape ({tasks}, 1), got {tuple(fn.batch_shape)}; "
            "give its own dimensions to the event with .to_event(1)"
        )


def _module_being_registered() -> nn.Module | None:
    # Pyro announces the parameters of pyro.module one by one and never the module itself.
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is pyro.module.__code__:
            return frame.f_locals["nn_module"]
        frame = frame.f_back
    return None
