"""The log density of a hierarchical model: log p(θ) and, batched over tasks, log p(φ_i, D_i | θ).

`TaskDensity` reads an ordinary Pyro model once and offers it as functions of flat unconstrained vectors: `theta`
`(d_theta,)` for all shared sites and `noise` `(T, d)` for the task sites of a batch, by default in whitened
coordinates (`whitening.py`). Every function is recorded (`recording.py`) and can be mapped over draws. Inference
methods, posteriors and predictions are functions of this object and of nothing else the model holds.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy import dependence, whitening
from bayesmeta.hierarchy.latents import Fixed, Flat, Given, Sampled, Structure, shaped
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.hierarchy.probing import attempt, first_rows, probe
from bayesmeta.hierarchy.recording import Captured, Recorded, model_context, seeded
from bayesmeta.hierarchy.rewriting import looked_up
from bayesmeta.hierarchy.tracing import Latents, Learned, Model, Site, Trace, trace_model

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
        log_joint: The same, and log p(θ) with its Jacobian: `((T,), ())`.
        log_parts: The same as two terms, log p(φ_i | θ) and log p(D_i | φ_i, θ).
        log_task_unconstrained: The same in plain unconstrained coordinates.
        constrain: `(theta, noise, data, values) -> {site: value}`; task sites `(T, *event)`.
        log_rows: `(theta, noise, data, values) -> {site: (T, N)}` log likelihood of each row, NaN where it is masked.
        outcomes, means: Draws and means of the observed sites at the rows of `data`.
        normals: `{site: (loc (T, 1, N), Cholesky factor (T, 1, N, N), data (T, 1, N))}` of multivariate normal sites.
        prior_noise: `(theta, zeros (T, d), data, values) -> (T, d)` draws of the prior, in whitened coordinates.
        prior_theta: `(zeros (d_theta,), zeros (T, d), data, values) -> (d_theta,)` a draw of θ's prior.

    Raises:
        ValueError: The model cannot be used (discrete or row-wise latent sites, no task plate, …), with the cure.
    """

    def __init__(self, model: Model, tasks: Tasks, *, dtype: torch.dtype = torch.float64) -> None:
        self.model, self.schema, self.dtype = model, tasks.schema, dtype
        self.learned = Learned()
        with seeded(0):
            self.structure = self._read(tasks)
            self.frozen = self._check_captured(tasks)
            self.structure = replace(self.structure, **probe(self._trial(tasks, 0.2), tasks, self.structure, dtype))
        self._probe_tensors = self.tensors(tasks.batch([0]))
        largest = tasks[[int(tasks.sizes.argmax())]]
        self._with_and_without = (
            largest.batch([0], rows=max(2, int(largest.sizes[0]))),
            largest.without_rows().batch([0]),
        )
        self.log_task = self._recorded(lambda trace, latents: trace.log_task())
        self.log_joint = self._recorded(lambda trace, latents: (trace.log_task(), trace.shared_prior))
        self.log_task_unconstrained = self._recorded(lambda trace, latents: trace.log_task(), whitened=False)
        self.log_parts = self._recorded(lambda trace, latents: (trace.log_prior(), trace.log_likelihood()))
        self.constrain = self._recorded(lambda trace, latents: self._task_values(trace))
        self.log_rows = self._recorded(lambda trace, latents: trace.kept_rows())
        self.outcomes = self._recorded(lambda trace, latents: dict(trace.outcomes), outcome="sample", random=True)
        self.means = self._recorded(lambda trace, latents: dict(trace.outcomes), outcome="mean")
        self.normals = self._recorded(lambda trace, latents: dict(trace.normals), outcome="normal")
        self.prior_noise = self._recorded(self._drawn, random=True, sampled="task")
        self.prior_theta = self._recorded(self._drawn_theta, random=True, sampled="all")
        self._shared_prior = self._recorded(lambda trace, latents: trace.shared_prior, vary=1)
        self._shared_values = self._recorded(lambda trace, latents: dict(trace.values), vary=1)
        self._untrained = dict(self.learned.values)

    def again(self) -> TaskDensity:
        """The same density with its learned values as they were at first; what was recorded and compiled is shared."""
        copied = copy.copy(self)
        copied.learned = replace(self.learned, values=dict(self._untrained))
        return copied

    @functools.cached_property
    def values_read_rows(self) -> bool:
        """Whether values of task sites may depend on the rows of a task, or cannot be had without them."""
        full, empty = (self._tried(batch) for batch in self._with_and_without)
        return self.structure.exact_size or dependence.reads_rows(self.constrain, full, empty)

    @functools.cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Coordinates of the noise in the order in which sites are best inferred: scales, the others, what has these.

        A site comes after those that its prior depends on, and after the positive ones that depend on none.
        """
        theta, _, data, values = self._tried(self._with_and_without[0])
        return dependence.stages(
            self.structure.task, lambda noise: self.constrain(theta, noise, data, values), self.dtype
        )

    @functools.cached_property
    def index_columns(self) -> dict[str, int]:
        """Columns that the model takes as places in a vector, "column:name" or "task_column:name", and its length."""
        used = self.log_task.inputs(looked_up, *self._tried(self._with_and_without[0]), eagerly=0)[2]
        return {key: count for key, count in used.items() if count}

    def _tried(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Arguments of the model's functions at one task."""
        noise = torch.ones(1, self.structure.task_size, dtype=self.dtype)
        return self.initial_theta(), noise, self.tensors(batch), dict(self.learned.values)

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        """The tensors of a batch as the model's functions take them: floating ones in `dtype`."""
        return {k: t.to(self.dtype) if t.is_floating_point() else t for k, t in batch.tensors.items()}

    def log_prior(self, theta: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log prior of θ with its Jacobian: `(d_theta,)` -> `()`, or `(S, d_theta)` -> `(S,)`."""
        return self._of_theta(self._shared_prior, theta, values)

    def shared_values(self, theta: Tensor) -> dict[str, Tensor]:
        """Shared sites and shared deterministic values: `(d_theta,)` -> `(*event)`, `(S, d_theta)` -> `(S, *event)`."""
        return self._of_theta(self._shared_values, theta, None)

    def _of_theta(self, function: Recorded, theta: Tensor, values: Mapping[str, Tensor] | None) -> Any:
        noise = theta.new_zeros(1, self.structure.task_size)
        args = (theta, noise, self._probe_tensors, dict(self.learned.values if values is None else values))
        if theta.dim() == 1:
            return function(*args)
        return function.mapped(*args, in_dims=(0, None, None, None))

    def draw_theta(self, count: int) -> Tensor:
        """Draws of θ's prior `(count, d_theta)`.

        Raises:
            ValueError: A shared site has an improper prior.
        """
        if not self.structure.shared:
            return torch.zeros(count, 0, dtype=self.dtype)
        theta = torch.zeros(count, self.structure.shared_size, dtype=self.dtype)
        with torch.no_grad():
            return self._of_theta(self.prior_theta, theta, None)

    def simulate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws θ, φ and every outcome of a batch from the model: `(values of all sites, outcomes)`."""
        latents = Sampled(self.structure, None)
        with model_context(self.dtype), torch.no_grad():
            trace, _ = self._trace(Batch(self.tensors(batch), batch.names, self.schema), latents, outcome="sample")
        return trace.values | self._task_values(trace), trace.outcomes

    def theta_of(self, values: Mapping[str, Any]) -> Tensor:
        """The unconstrained θ `(d_theta,)` of given values of all shared sites.

        Raises:
            ValueError: A site is missing, unknown, of another shape, or outside its support.
        """
        names = [site.name for site in self.structure.shared]
        if sorted(values) != sorted(names):
            raise ValueError(f"shared: expected a value for each of {sorted(names)}, got {sorted(values)}")
        given = Given({site.name: shaped(site, values[site.name], self.dtype) for site in self.structure.shared})
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
        """Which rows of a batch lie outside the support of their likelihood, whatever the task: `{site: (T, N)}`.

        A support that depends on parameters excludes no row: the density says what is possible in which task.
        """
        noise = theta.new_zeros(len(batch.names), self.structure.task_size)
        whole = Batch(self.tensors(batch), batch.names, self.schema)
        for graded in (False, True):
            theta, noise = (value.detach().requires_grad_(graded) for value in (theta, noise))
            latents = Flat(self.structure, theta, noise, True)
            with model_context(self.dtype), torch.set_grad_enabled(graded):
                trace, _ = self._trace(whole, latents, outcome="support")
            if all(inside.all() for inside in trace.outcomes.values()):
                break
        return {name: ~inside for name, inside in trace.outcomes.items()}

    def terms(self, batch: Batch, theta: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Log density terms a site and task, for finding the one that is not finite: `{site: (T,)}`."""
        with model_context(self.dtype), torch.no_grad():
            trace, _ = self._trace(
                Batch(self.tensors(batch), batch.names, self.schema), Flat(self.structure, theta, noise, True)
            )
        return {name: t.sum(-1) for name, t in (trace.task_prior | trace.rows).items()}

    def modules(self) -> dict[str, nn.Module]:
        """Copies of the model's registered modules with the fit's weights."""
        return {name: self._filled(name, module) for name, module in self.learned.modules.items()}

    def _filled(self, name: str, module: nn.Module) -> nn.Module:
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
        sampled: str = "",
        outcome: str = "score",
        random: bool = False,
        vary: int = 2,
    ) -> Recorded:
        def function(theta: Tensor, noise: Tensor, data: dict[str, Tensor], values: dict[str, Tensor]) -> Any:
            names = tuple(f"task {i}" for i in range(noise.shape[0]))
            latents: Flat = Flat(self.structure, theta, noise, whitened)
            if sampled:
                latents = Sampled(self.structure, theta if sampled == "task" else None)
            learned = replace(self.learned, values=values)
            batch = Batch(data, names, self.schema)
            trace, _ = trace_model(self.model, batch, latents, learned, dtype=self.dtype, outcome=outcome)
            for name in set(self.structure.unmasked) & set(trace.rows):
                trace.rows[name] = torch.where(batch.n.unsqueeze(-1) > 0, trace.rows[name], 0.0)
            return pick(trace, latents)

        context = functools.partial(model_context, self.dtype)
        return Recorded(function, context=context, random=random, vary=vary, strict=random or outcome != "score")

    def _task_values(self, trace: Trace) -> dict[str, Tensor]:
        """Task sites and deterministic values `(T, *event)`, without the row dimension."""
        return {name: trace.task_values[name].squeeze(1) for name in self.structure.task_values}

    def _drawn(self, trace: Trace, latents: Sampled) -> Tensor:
        parts = [latents.drawn[site.name] for site in self.structure.task]
        return torch.cat(parts, -1) if parts else torch.zeros(trace.tasks, 0)

    def _drawn_theta(self, trace: Trace, latents: Sampled) -> Tensor:
        parts = [latents.drawn[site.name].reshape(-1) for site in self.structure.shared]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _trial(self, tasks: Tasks, centre: float) -> Callable[[list[int], int], Trace]:
        def run(index: list[int], rows: int) -> Trace:
            batch = tasks.batch(index, rows=rows)
            with model_context(self.dtype), torch.no_grad():
                data = Batch(self.tensors(batch), batch.names, self.schema)
                return self._trace(data, Fixed(centre))[0]

        return run

    def labels(self, site: str, batch: Batch) -> Batch:
        """The batch with what an observed site observes as its labels, as far as the model says it."""
        return self.model.likelihood.labels(site, batch) if isinstance(self.model, HierarchicalModel) else batch

    def _read(self, tasks: Tasks) -> Structure:
        trace = attempt(self._trial(tasks, 0.0), *first_rows(tasks))
        if not any(in_tasks for _, in_tasks, _ in trace.latent):
            raise ValueError(
                "the model samples nothing inside `with batch.tasks():`; expected at least one task site there "
                "(a model without task parameters is a bm.ConditionalModel)"
            )
        with model_context(self.dtype), torch.no_grad():
            sites = [(in_tasks, _site(name, in_tasks, fn)) for name, in_tasks, fn in trace.latent]
            moments = [whitening.unconstrained_moments(fn) for _, in_tasks, fn in trace.latent if not in_tasks]
        shared = tuple(site for in_tasks, site in sites if not in_tasks)
        task = tuple(site for in_tasks, site in sites if in_tasks)
        named = tuple(name for name, value in trace.task_values.items() if value.shape[:2] == (trace.tasks, 1))
        self._prior_scale = self._stacked(moments)
        return Structure(shared, task, tuple(trace.observed), tuple(trace.values), named)

    def _stacked(self, moments: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        flat = [torch.stack([m.to(self.dtype).reshape(-1) for m in pair]) for pair in moments]
        location, scale = torch.cat([torch.zeros(2, 0, dtype=self.dtype), *flat], 1)
        return location, scale

    def _check_captured(self, tasks: Tasks) -> dict[int, Tensor]:
        index, rows = first_rows(tasks)
        batch = tasks.batch(index, rows=rows)
        with model_context(self.dtype), torch.no_grad():
            _, captured = self._trace(Batch(self.tensors(batch), batch.names, self.schema), Fixed())
        if captured.unregistered:
            shapes = [tuple(p.shape) for p in captured.unregistered.values()]
            raise ValueError(
                f"the model uses {len(shapes)} trainable parameter(s) that nobody registered (shapes {shapes}); "
                'register their module with pyro.module("net", net) inside the model, or freeze it: '
                "net.requires_grad_(False)"
            )
        return captured.frozen


class Read:
    """A model that has been read: whoever fits it to many collections of tasks of one schema reads it once.

    Args:
        density: The model's density.
    """

    def __init__(self, density: TaskDensity) -> None:
        self.density = density

    def __call__(self, batch: Batch) -> Any:
        """Runs the model."""
        return self.density.model(batch)


def read(model: Model, tasks: Tasks, *, dtype: torch.dtype) -> TaskDensity:
    """The density of a model, read with these tasks unless it has been read already.

    Raises:
        ValueError: The model cannot be used, or has been read with tasks of other columns or another dtype.
    """
    if not isinstance(model, Read):
        return TaskDensity(model, tasks, dtype=dtype)
    density = model.density
    if (density.schema.dtypes, density.dtype) != (tasks.schema.dtypes, dtype):
        raise ValueError(
            f"a model that was read with columns {density.schema.dtypes} in {density.dtype} cannot be used with "
            f"{tasks.schema.dtypes} in {dtype}; read it anew"
        )
    return density.again()


def _site(name: str, in_tasks: bool, fn: dist.TorchDistribution) -> Site:
    cut = whitening.BATCH_DIMS if in_tasks else 0
    unconstrained = tuple(whitening.bijection(fn).inverse_shape(fn.shape()))
    kind = whitening.kind(fn) if in_tasks else ""
    even, positive = whitening.is_even(fn), whitening.is_positive(fn)
    return Site(name, tuple(fn.shape())[cut:], unconstrained[cut:], kind, whitening.is_improper(fn), even, positive)
