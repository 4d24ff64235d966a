"""The log density of a hierarchical model: log p(θ) and, batched over tasks, log p(φ_i, D_i | θ).

`TaskDensity` reads an ordinary Pyro model once and offers it as functions of flat unconstrained vectors: `theta`
`(d_theta,)` for all shared sites and `noise` `(T, d)` for the task sites of a batch, by default in whitened
coordinates (`whitening.py`). Every function is recorded (`recording.py`) and can be mapped over draws. Inference
methods, posteriors and predictions are functions of this object and of nothing else the model holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy import whitening
from bayesmeta.hierarchy.recording import Captured, Recorded, model_context
from bayesmeta.hierarchy.tracing import Latents, Learned, Model, ObservedSite, Site, Trace, trace_model

PROBE_TASKS = 3
"""How many tasks the model is read with."""


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    `exact_size`: padding changes the density, so tasks are batched by exact size. `coupled`: sites whose event covers
    the rows of a task.
    """

    shared: tuple[Site, ...]
    task: tuple[Site, ...]
    observed: tuple[ObservedSite, ...]
    shared_values: tuple[str, ...]
    task_values: tuple[str, ...]
    exact_size: bool = False
    coupled: tuple[str, ...] = ()

    @property
    def shared_size(self) -> int:
        """Unconstrained dimension of θ."""
        return sum(site.size for site in self.shared)

    @property
    def task_size(self) -> int:
        """Unconstrained dimension of one task's φ."""
        return sum(site.size for site in self.task)

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Observed sites that can be predicted."""
        return tuple(site.name for site in self.observed if not site.factor and not site.shared)


def split(sites: tuple[Site, ...], flat: Tensor) -> dict[str, Tensor]:
    """Cuts a flat vector `(..., size)` into `(..., *unconstrained)` a site."""
    parts = flat.split([site.size for site in sites], -1)
    return {s.name: p.reshape((*flat.shape[:-1], *s.unconstrained)) for s, p in zip(sites, parts, strict=True)}


class _Flat:
    """Latents given by flat vectors. `whitened`: task coordinates are noise, else plain unconstrained space."""

    def __init__(self, structure: Structure, theta: Tensor, noise: Tensor, whitened: bool) -> None:
        self._theta = split(structure.shared, theta)
        self._noise = split(structure.task, noise.unsqueeze(1))
        self._whitened = whitened

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Constrains the site's part of θ."""
        return _constrain(fn, self._theta[name])

    def task(self, name: str, fn: dist.TorchDistribution, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Maps the site's noise to its value."""
        if not self._whitened:
            return _constrain(fn, self._noise[name])
        value, log_prior = whitening.whiten(fn, self._noise[name])
        if plain:
            return value, log_prior, torch.zeros_like(log_prior)
        log_prob = fn.log_prob(value)
        return value, log_prob, log_prior - log_prob


class _Sampled(_Flat):
    """Task sites drawn from their prior given θ; `drawn` collects their noise. Shared sites too if `theta` is None."""

    def __init__(self, structure: Structure, theta: Tensor | None) -> None:
        sizes = (structure.shared_size, structure.task_size)
        super().__init__(structure, torch.zeros(sizes[0]) if theta is None else theta, torch.zeros(1, sizes[1]), True)
        self._draw_shared = theta is None
        self.drawn: dict[str, Tensor] = {}

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Takes θ as given or draws it."""
        if not self._draw_shared:
            return super().shared(name, fn)
        if isinstance(fn, dist.ImproperUniform):
            raise ValueError(f"shared site {name!r} has a flat (improper) prior, which cannot be simulated from")
        value = fn.sample()
        self.drawn[name] = whitening.bijection(fn).inv(value)
        return value, torch.zeros(()), torch.zeros(())

    def task(self, name: str, fn: dist.TorchDistribution, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draws noise where the whitening is exact, a value otherwise."""
        if whitening.kind(fn) == "moments":
            value = fn.sample()
            noise = whitening.unwhiten(fn, value)
        else:
            noise = torch.randn(whitening.bijection(fn).inverse_shape(fn.shape()))
            value, _ = whitening.whiten(fn, noise)
        self.drawn[name] = noise.reshape(noise.shape[0], -1)
        return value, torch.zeros(noise.shape[0], 1), torch.zeros(noise.shape[0], 1)


def _constrain(fn: dist.TorchDistribution, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    transform = whitening.bijection(fn)
    value = transform(u)
    improper = isinstance(fn, dist.ImproperUniform)
    log_jacobian = transform.log_abs_det_jacobian(u, value)
    log_prob = torch.zeros_like(log_jacobian) if improper else fn.log_prob(value)
    return value, log_prob, log_jacobian


class _Origin:
    """Latents of the first reading: unconstrained zero, the middle of most priors."""

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Constrains zero."""
        return _constrain(fn, torch.zeros(whitening.bijection(fn).inverse_shape(fn.shape())))

    def task(self, name: str, fn: dist.TorchDistribution, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Maps zero noise."""
        value, log_prior = whitening.whiten(fn, torch.zeros(whitening.bijection(fn).inverse_shape(fn.shape())))
        return value, log_prior, torch.zeros_like(log_prior)


class _Given(_Origin):
    """Shared sites at given constrained values; `theta` collects their unconstrained coordinates."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self.theta: dict[str, Tensor] = {}

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the value as given."""
        value = self._values[name]
        if not bool(whitening.support(fn).check(value).all()):
            raise ValueError(f"shared: {name!r} = {value.tolist()} is outside its support {whitening.support(fn)}")
        self.theta[name] = whitening.bijection(fn).inv(value)
        return value, torch.zeros(()), torch.zeros(())


def _shaped(site: Site, value: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.as_tensor(value, dtype=dtype)
    if tuple(tensor.shape) != site.shape:
        raise ValueError(f"shared: {site.name!r} must have shape {site.shape}, got {tuple(tensor.shape)}")
    return tensor


Pick = Callable[[Trace, Any], Any]


class TaskDensity:
    """A hierarchical model as functions of flat unconstrained vectors.

    Args:
        model: Ordinary Pyro function of a `Batch`.
        tasks: The tasks it will be used with; a few of them serve to read it.
        dtype: Floating dtype of every call.

    Attributes:
        structure: The sites.
        learned: Registered parameters (point estimates), modules and buffers.
        log_task: `(theta, noise (T, d), data, values) -> (T,)`, log p(φ_i, D_i | θ) in whitened coordinates.
        log_parts: The same as two terms, log p(φ_i | θ) and log p(D_i | φ_i, θ).
        log_task_unconstrained: The same in plain unconstrained coordinates.
        constrain: `(theta, noise, data, values) -> {site: value}`; task sites `(T, *event)`.
        log_rows: `(theta, noise, data, values) -> {site: (T, N)}` log likelihood of each row.
        outcomes, means: Draws and means of the observed sites at the rows of `data`.
        prior_noise: `(theta, zeros (T, d), data, values) -> (T, d)` draws of the prior, in whitened coordinates.

    Raises:
        ValueError: The model cannot be used (discrete or row-wise latent sites, no task plate, …), with the cure.
    """

    def __init__(self, model: Model, tasks: Tasks, *, dtype: torch.dtype = torch.float64) -> None:
        self.model, self.schema, self.dtype = model, tasks.schema, dtype
        self.learned = Learned()
        probe = tasks.batch(range(min(PROBE_TASKS, len(tasks))))
        self.structure = self._read(probe)
        self.frozen = self._check_captured(probe)
        self._probe_tensors = self.tensors(tasks.batch([0]))
        self.log_task = self._recorded(lambda trace, latents: trace.log_task())
        self.log_task_unconstrained = self._recorded(lambda trace, latents: trace.log_task(), whitened=False)
        self.log_parts = self._recorded(lambda trace, latents: (trace.log_prior(), trace.log_likelihood()))
        self.constrain = self._recorded(_values)
        self.log_rows = self._recorded(lambda trace, latents: dict(trace.rows))
        self.outcomes = self._recorded(lambda trace, latents: dict(trace.outcomes), outcome="sample", random=True)
        self.means = self._recorded(lambda trace, latents: dict(trace.outcomes), outcome="mean")
        self.prior_noise = self._recorded(self._drawn, random=True, sampled=True)
        self._shared_prior = self._recorded(lambda trace, latents: trace.shared_prior, vary=1)
        self._shared_values = self._recorded(lambda trace, latents: dict(trace.values), vary=1)
        self.structure = replace(self.structure, **self._check_rows(tasks))

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        """The tensors of a batch as the model's functions take them: floating ones in `dtype`."""
        return {k: t.to(self.dtype) if t.is_floating_point() else t for k, t in batch.tensors.items()}

    def log_prior(self, theta: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log prior of θ with its Jacobian: `(d_theta,)` -> `()`, or `(S, d_theta)` -> `(S,)`."""
        return self._of_theta(self._shared_prior, theta, values)

    def shared_values(self, theta: Tensor) -> dict[str, Tensor]:
        """Shared sites and shared deterministic values of θ: `(d_theta,)` -> `(*event)`, `(S, d_theta)` -> `(S, *event)`."""
        return self._of_theta(self._shared_values, theta, None)

    def _of_theta(self, function: Recorded, theta: Tensor, values: Mapping[str, Tensor] | None) -> Any:
        noise = theta.new_zeros(1, self.structure.task_size)
        args = (theta, noise, self._probe_tensors, dict(self.learned.values if values is None else values))
        if theta.dim() == 1:
            return function(*args)
        return function.mapped(*args, in_dims=(0, None, None, None))

    def simulate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws θ, φ and every outcome of a batch from the model: `(values of all sites, outcomes)`."""
        latents = _Sampled(self.structure, None)
        with model_context(self.dtype), torch.no_grad():
            trace, _ = self._trace(Batch(self.tensors(batch), batch.names, self.schema), latents, outcome="sample")
        return trace.values | _values(trace, latents), trace.outcomes

    def theta_of(self, values: Mapping[str, Any]) -> Tensor:
        """The unconstrained θ `(d_theta,)` of given values of all shared sites.

        Raises:
            ValueError: A site is missing, unknown, of another shape, or outside its support.
        """
        names = [site.name for site in self.structure.shared]
        if sorted(values) != sorted(names):
            raise ValueError(f"shared: expected a value for each of {sorted(names)}, got {sorted(values)}")
        given = _Given({site.name: _shaped(site, values[site.name], self.dtype) for site in self.structure.shared})
        with model_context(self.dtype), torch.no_grad():
            self._trace(Batch(self._probe_tensors, ("probe",), self.schema), given)
        return torch.cat([given.theta[name].reshape(-1) for name in names]) if names else self.initial_theta()

    def initial_theta(self) -> Tensor:
        """Unconstrained zero, where every shared site is inside its support."""
        return torch.zeros(self.structure.shared_size, dtype=self.dtype)

    def prior_scale(self) -> tuple[Tensor, Tensor]:
        """Location and scale of θ's prior in unconstrained coordinates, `(d_theta,)` each; (0, 1) where it has none."""
        return self._prior_scale

    def outside_support(self, batch: Batch, theta: Tensor) -> dict[str, Tensor]:
        """Which rows of a batch lie outside the support of their likelihood at the prior's centre: `{site: (T, N)}`."""
        noise = theta.new_zeros(len(batch.names), self.structure.task_size)
        latents = _Flat(self.structure, theta, noise, True)
        with model_context(self.dtype), torch.no_grad():
            trace, _ = self._trace(Batch(self.tensors(batch), batch.names, self.schema), latents, outcome="support")
        return {name: ~inside for name, inside in trace.outcomes.items()}

    def terms(self, batch: Batch, theta: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Log density terms a site and task, for finding the one that is not finite: `{site: (T,)}`."""
        with model_context(self.dtype), torch.no_grad():
            trace, _ = self._trace(
                Batch(self.tensors(batch), batch.names, self.schema), _Flat(self.structure, theta, noise, True)
            )
        return {name: t.sum(-1) for name, t in (trace.task_prior | trace.rows).items()}

    def modules(self) -> dict[str, nn.Module]:
        """Copies of the model's registered modules with the fit's weights."""
        return {name: self._filled(name, module) for name, module in self.learned.modules.items()}

    def _filled(self, name: str, module: nn.Module) -> nn.Module:
        import copy

        copied = copy.deepcopy(module)
        with torch.no_grad():
            for key, parameter in copied.named_parameters():
                value = self.learned.values.get(f"{name}$$${key}")
                if value is not None:
                    parameter.copy_(value)
        return copied

    def _trace(self, batch: Batch, latents: Latents, *, outcome: str = "score") -> tuple[Trace, Captured]:
        return trace_model(self.model, batch, latents, self.learned, dtype=self.dtype, outcome=outcome)

    def _recorded(
        self,
        pick: Pick,
        *,
        whitened: bool = True,
        sampled: bool = False,
        outcome: str = "score",
        random: bool = False,
        vary: int = 2,
    ) -> Recorded:
        def function(theta: Tensor, noise: Tensor, data: dict[str, Tensor], values: dict[str, Tensor]) -> Any:
            names = tuple(f"task {i}" for i in range(noise.shape[0]))
            latents = _Sampled(self.structure, theta) if sampled else _Flat(self.structure, theta, noise, whitened)
            learned = replace(self.learned, values=values)
            batch = Batch(data, names, self.schema)
            trace, _ = trace_model(self.model, batch, latents, learned, dtype=self.dtype, outcome=outcome)
            return pick(trace, latents)

        context = functools.partial(model_context, self.dtype)
        return Recorded(function, context=context, random=random or outcome == "sample", vary=vary)

    def _drawn(self, trace: Trace, latents: _Sampled) -> Tensor:
        parts = [latents.drawn[site.name] for site in self.structure.task]
        return torch.cat(parts, -1) if parts else torch.zeros(trace.tasks, 0)

    def _read(self, probe: Batch) -> Structure:
        with model_context(self.dtype), torch.no_grad():
            data = Batch(self.tensors(probe), probe.names, self.schema)
            try:
                trace, _ = self._trace(data, _Origin())
            except RuntimeError as error:
                raise ValueError(
                    _FAILED.format(tasks=len(probe.names), rows=probe.mask.shape[1], error=error)
                ) from error
            shared = tuple(_site(name, fn, 0) for name, in_tasks, fn in trace.latent if not in_tasks)
            task = tuple(_site(name, fn, whitening.BATCH_DIMS) for name, in_tasks, fn in trace.latent if in_tasks)
            moments = [whitening.unconstrained_moments(fn) for _, in_tasks, fn in trace.latent if not in_tasks]
            empty = [torch.zeros(0)]
            self._prior_scale = (
                torch.cat([loc.reshape(-1) for loc, _ in moments] or empty),
                torch.cat([scale.reshape(-1) for _, scale in moments] or empty),
            )
        if not task:
            raise ValueError(
                "the model samples nothing inside `with batch.tasks():`; expected at least one task site there "
                "(a model without task parameters is a bm.ConditionalModel)"
            )
        values = tuple(trace.values)
        return Structure(shared, task, tuple(trace.observed), values, tuple(_values(trace, None)))

    def _check_captured(self, probe: Batch) -> dict[int, nn.Parameter]:
        with model_context(self.dtype), torch.no_grad():
            _, captured = self._trace(Batch(self.tensors(probe), probe.names, self.schema), _Origin())
        if captured.unregistered:
            shapes = [tuple(p.shape) for p in captured.unregistered.values()]
            raise ValueError(
                f"the model uses {len(shapes)} trainable parameter(s) that nobody registered (shapes {shapes}); "
                'register their module with pyro.module("net", net) inside the model, or freeze it: '
                "net.requires_grad_(False)"
            )
        return captured.frozen

    def _check_rows(self, tasks: Tasks) -> dict[str, Any]:
        """Finds out by trial whether padding a task changes its density, and which sites cover the rows."""
        index = list(range(min(PROBE_TASKS, len(tasks))))[:-1] or [0]
        rows = max(1, int(tasks.sizes[index].max()))
        exact, padded = self._score(tasks, index, rows), self._score(tasks, index, rows + 1)
        sizes = {int(n) for n in tasks.sizes[index]}
        single = [self._score(tasks, [i], max(1, int(tasks.sizes[i]))) for i in index] if len(sizes) > 1 else [exact]
        same = torch.allclose(exact[0], padded[0], rtol=1e-9) and torch.allclose(
            torch.cat([s[0] for s in single]), exact[0], rtol=1e-9
        )
        coupled = tuple(a.name for a, b in zip(exact[1], padded[1], strict=True) if a.event != b.event)
        return {"exact_size": not same or bool(coupled), "coupled": coupled}

    def _score(self, tasks: Tasks, index: list[int], rows: int) -> tuple[Tensor, list[ObservedSite]]:
        batch = tasks.batch(index, rows=rows)
        theta = self.initial_theta()
        noise = torch.full((len(index), self.structure.task_size), 0.1, dtype=self.dtype)
        with model_context(self.dtype), torch.no_grad():
            data = Batch(self.tensors(batch), batch.names, self.schema)
            try:
                trace, _ = self._trace(data, _Flat(self.structure, theta, noise, True))
            except RuntimeError as error:
                raise ValueError(_FAILED.format(tasks=len(index), rows=rows, error=error)) from error
        return trace.log_task(), trace.observed


_FAILED = (
    "the model function failed on a batch of {tasks} task(s) padded to {rows} row(s): {error}. If it uses data from "
    "outside whose size depends on the tasks or rows, pass it as a column (columns=, task_columns=) and read batch[...]"
)


def _values(trace: Trace, latents: Any) -> dict[str, Tensor]:
    """Task sites and deterministic values `(T, *event)`, without the row dimension."""
    shaped = {k: v for k, v in trace.task_values.items() if v.dim() >= 2 and v.shape[:2] == (trace.tasks, 1)}
    return {name: value.squeeze(1) for name, value in shaped.items()}


def _site(name: str, fn: dist.TorchDistribution, batch_dims: int) -> Site:
    shape = tuple(fn.shape())
    unconstrained = tuple(whitening.bijection(fn).inverse_shape(fn.shape()))
    kind = whitening.kind(fn) if batch_dims else ""
    return Site(name, shape[batch_dims:], unconstrained[batch_dims:], kind, isinstance(fn, dist.ImproperUniform))
