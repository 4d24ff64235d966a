"""A hierarchical model put together from components, without a line of Pyro, and a learner without task parameters.

`HierarchicalModel` is an ordinary Pyro model of a batch, as a user's own function would be; `ConditionalModel` holds a
module that maps a context to predictions. `fit` takes both. Nothing here infers anything.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, final

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.binding import as_pyro, bind, in_default_dtype
from bayesmeta.hierarchy.likelihood_base import Likelihood, as_likelihood
from bayesmeta.hierarchy.priors import Prior, as_prior, one_phi_a_task

Conditional = Callable[[Any, Mapping[str, Tensor], Batch, Tensor], Distribution]
_RESERVED = ("phi", "task", "obs")


def _unfitted(learner: str, verb: str) -> NoReturn:
    raise ValueError(
        f"{verb}: expected a fit, got a {learner} that is not fitted: "
        f"fit = bm.fit(model, tasks) first, then fit.{verb}(…)"
    )


@final
class _SharedValues(dict[str, Tensor]):
    """Shared parameters by name; an unknown name says what there is."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f"unknown shared parameter {name!r}; known: {sorted(self)}. Declare it with shared={{{name!r}: prior}}, "
            f"or where a function builds the model, bm.likelihoods.Custom(function, priors={{{name!r}: prior}})"
        )


class HierarchicalModel:
    """θ ~ p(θ); φ_i ~ p(φ | θ); y_ij ~ p(y | f(φ_i, x_ij), θ), as a Pyro model of a `Batch`.

    Sites: the shared sites of the prior (`mu`, `tau`, `corr`), those of the likelihood (`sigma`, `nu`, `concentration`,
    `cutpoints`), then the declared ones, in this order; the task site `phi` (T, 1, d); the observed site `y`, or those
    of a likelihood that has several.

    Example:
        >>> from bayesmeta.hierarchy import likelihoods, priors
        >>> model = HierarchicalModel(
        ...     priors.Gaussian(2), lambda phi, x: phi[..., 0] + phi[..., 1] * x[..., 0], likelihoods.Normal()
        ... )
        >>> model
        HierarchicalModel(phi: Gaussian, y: Normal, shared: mu, tau, sigma)
    """

    def __init__(
        self,
        prior: Prior | Callable[..., Any] | Distribution,
        predictor: Callable[..., Tensor],
        likelihood: Likelihood | Callable[..., Any],
        *,
        shared: Mapping[str, Distribution | Callable[..., Any]] | None = None,
        conditional: Conditional | None = None,
    ) -> None:
        """Puts the components together; modules among them are registered when the model is called.

        Args:
            prior: one of `priors`, a callable `(shared) -> Distribution` or `(shared, batch)`, or a fixed Distribution
                of event shape `(d,)` or `()`.
            predictor: callable or module `(phi (T,1,d), x (T,N,*dx)) -> (T,N,*k)`; it may also take `batch` and
                `shared` by name.
            likelihood: one of `likelihoods`, or a callable with any of the arguments `(f, batch, shared)`.
            shared: further shared sites by name: a Distribution, or a callable of the earlier shared values.
            conditional: `(phi, shared, context, x) -> Distribution` of new rows where the likelihood couples rows.

        Raises:
            ValueError: if a component is not callable, asks for arguments nobody has, or a shared name is taken.
        """
        self.prior = as_prior(prior)
        self.predictor = predictor
        self.likelihood = as_likelihood(likelihood)
        self.conditional = _conditional(conditional)
        self._predict = bind(predictor, role="predictor", names=("phi", "x", "batch", "shared"), positional=2)
        self._declared = {name: _declaration(name, site) for name, site in (shared or {}).items()}
        parts = {"prior": prior, "predictor": predictor, "likelihood": likelihood}
        self._modules = {role: part for role, part in parts.items() if isinstance(part, nn.Module)}
        self._modules |= self.likelihood.modules
        self._refuse_taken_names()

    def _refuse_taken_names(self) -> None:
        taken = [*_RESERVED, *self.prior.shared, *self.likelihood.shared, *self.likelihood.sites]
        clashes = sorted({name for name in (*taken, *self._declared) if (*taken, *self._declared).count(name) > 1})
        if clashes:
            raise ValueError(
                f"HierarchicalModel: expected other names in shared= or priors= than {sorted(set(taken))}, which the "
                f"components use, got {clashes} again; rename them"
            )

    def __repr__(self) -> str:
        sites = ", ".join([*self.prior.shared, *self.likelihood.shared, *self._declared]) or "none"
        return (
            f"HierarchicalModel(phi: {type(self.prior).__name__}, y: {type(self.likelihood).__name__}, shared: {sites})"
        )

    def __call__(self, batch: Batch) -> None:
        """Runs the model on a batch; Pyro handlers see its sites.

        Raises:
            ValueError: if a component returns something of the wrong kind or shape.
        """
        for role, module in self._modules.items():
            _register(role, module)
        shared = self._sample_shared()
        with batch.tasks():
            phi = pyro.sample("phi", one_phi_a_task(self.prior.distribution(shared, batch), batch))
            f = self._predict(phi=phi, x=batch.x, batch=batch, shared=shared)
            if not isinstance(f, Tensor):
                raise ValueError(f"predictor: expected a tensor (T, N, *k), got {type(f).__name__}")
            rows = pyro.plate("obs", batch.mask.shape[1], dim=-1)
            for observation in self.likelihood.observe(f, batch, shared):
                _observe(*observation, rows)

    def _sample_shared(self) -> dict[str, Tensor]:
        shared: dict[str, Tensor] = _SharedValues()
        for name, site in {**self.prior.shared, **self.likelihood.shared}.items():
            shared[name] = pyro.sample(name, _one_value(site, name))
        for name, build in self._declared.items():
            shared[name] = pyro.sample(name, _one_value(build(shared=shared), name))
        return shared

    def with_predictor(self, predictor: nn.Module) -> HierarchicalModel:
        """Returns the model with another module as its predictor."""
        other = copy.copy(self)
        other.predictor = predictor
        other._predict = bind(predictor, role="predictor", names=("phi", "x", "batch", "shared"), positional=2)
        other._modules = {**self._modules, "predictor": predictor}
        return other

    def check(self, tasks: Tasks) -> None:
        """Refuses tasks whose labels or columns lie outside the likelihood's support.

        Raises:
            ValueError: with the task, the value and the cure.
        """
        self.likelihood.check(tasks)

    def posterior(self, *_: object, **__: object) -> NoReturn:
        """Only a fit has posteriors."""
        _unfitted("HierarchicalModel", "posterior")

    def predict(self, *_: object, **__: object) -> NoReturn:
        """Only a fit predicts."""
        _unfitted("HierarchicalModel", "predict")

    def save(self, *_: object, **__: object) -> NoReturn:
        """Only a fit is saved."""
        _unfitted("HierarchicalModel", "save")


def _declaration(name: str, site: Distribution | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(name, str) or not name:
        raise ValueError(f"shared: expected names of sites, got {name!r}")
    if isinstance(site, Distribution):
        return lambda *, shared: in_default_dtype(site)
    return bind(site, role=f"shared[{name!r}]", names=("shared",), positional=1)


def _one_value(site: Any, name: str) -> Any:
    """A shared site has one value: what looks like a batch is the components of that value."""
    distribution: Any = as_pyro(site, role=f"shared[{name!r}]")
    return distribution.to_event(len(distribution.batch_shape))


def _register(role: str, module: nn.Module) -> None:
    with warnings.catch_warnings():
        # Pyro warns of frozen parameters in training mode, which are welcome here.
        warnings.filterwarnings("ignore", message=".*was not registered in the param store", category=UserWarning)
        pyro.module(role, module)


def _observe(site: str, outcome: Any, batch: Batch, rows: Any) -> None:
    """An observed site: one label a row, coupled rows, or a log likelihood a row."""
    if isinstance(outcome, Tensor):
        if outcome.shape != batch.mask.shape:
            raise ValueError(
                f"likelihood: expected a log likelihood for each row, shape {tuple(batch.mask.shape)}, got "
                f"{tuple(outcome.shape)}; expand it, or return a Distribution over a task's rows if they are coupled"
            )
        with batch.observations(rows):
            pyro.factor(site, outcome)
        return
    labels: Any = as_pyro(outcome, role="likelihood")
    y = batch.y.to(torch.get_default_dtype())
    if _couples_rows(labels, batch):
        pyro.sample(site, labels, obs=y.unsqueeze(1))
        return
    with batch.observations(rows):
        pyro.sample(site, labels, obs=y)


def _couples_rows(labels: Distribution, batch: Batch) -> bool:
    t, n = batch.mask.shape
    dy, event, shape = tuple(batch.y.shape[2:]), tuple(labels.event_shape), tuple(labels.batch_shape)
    if batch.schema.missing and (*dy, *event):
        raise ValueError(
            f"likelihood: expected complete labels for a distribution of event shape {event}, got missing ones; write "
            "the model as a Pyro function and use batch.output(k), or drop the incomplete rows"
        )
    coupled = event == (n, *dy) and event != dy
    if event in (dy, (n, *dy)) and _broadcasts(shape, (t, 1 if coupled else n)):
        return coupled
    raise ValueError(
        f"likelihood: expected a distribution of batch shape ({t}, {n}) and event shape {dy}, or, for coupled rows, of "
        f"batch shape ({t}, 1) and event shape {(n, *dy)}; got batch shape {shape} and event shape {event}; use "
        ".to_event(…), .unsqueeze(…) or index the last dimension of f"
    )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, int]) -> bool:
    return len(shape) <= 2 and all(size in (1, full) for size, full in zip((1, 1, *shape)[-2:], target, strict=True))


def _conditional(conditional: Conditional | None) -> Conditional | None:
    if conditional is not None and not callable(conditional):
        raise ValueError(
            f"conditional: expected a callable (phi, shared, context, x) -> Distribution, got {conditional!r}"
        )
    return conditional


class _WithConditional:
    """A model function that carries `conditional`."""

    def __init__(self, model: Callable[[Batch], Any], conditional: Conditional) -> None:
        functools.update_wrapper(self, model, updated=())
        self.model, self.conditional = model, conditional

    def __call__(self, batch: Batch) -> Any:
        return self.model(batch)


def with_conditional(model: Callable[[Batch], Any], fn: Conditional) -> Callable[[Batch], Any]:
    """Tells how `model` predicts where the rows of a task are coupled; `model` itself stays as it is.

    Args:
        model: a Pyro function of a batch, or a `HierarchicalModel`.
        fn: `(phi, shared, context, x) -> Distribution`: labels at new rows `x`, given the rows of `context`.

    Returns:
        A model with the attribute `conditional`.

    Raises:
        ValueError: if either is not callable.
    """
    if not callable(model) or fn is None:
        raise ValueError(f"with_conditional: expected a model and a callable, got {model!r} and {fn!r}")
    if isinstance(model, HierarchicalModel):
        carrying = copy.copy(model)
        carrying.conditional = _conditional(fn)
        return carrying
    return _WithConditional(model, _conditional(fn) or fn)


@final
class ConditionalModel:
    """A learner without task parameters: p(y | x, context) by a module, as a neural process.

    It has no density and no φ, so that a fit of it predicts and is never asked for a posterior.
    """

    def __init__(
        self,
        module: Callable[[Batch, Tensor], Distribution],
        *,
        objective: str | Callable[..., Any] = "predictive",
        context: tuple[int, int] = (0, 10),
    ) -> None:
        """Holds the module and how it is trained.

        Args:
            module: `(context: Batch, x (T,M,*dx)) -> Distribution` of batch shape `(T, M)`.
            objective: name or callable; "predictive" scores held-out targets given a context.
            context: smallest and largest size of a training context.

        Raises:
            ValueError: if the module is not callable or the sizes are out of order.
        """
        if not callable(module):
            raise ValueError(f"ConditionalModel: expected a callable (context, x) -> Distribution, got {module!r}")
        if not (isinstance(objective, str) or callable(objective)):
            raise ValueError(f"ConditionalModel: expected objective as a name or a callable, got {objective!r}")
        self.module, self.objective, self.context = module, objective, _sizes(context)

    def __call__(self, context: Batch, x: Tensor) -> Distribution:
        """Distribution of the labels at `x`, given the context.

        Raises:
            ValueError: if the module returns no distribution of batch shape `(T, M)`.
        """
        labels = as_pyro(self.module(context, x), role="ConditionalModel module")
        if tuple(labels.batch_shape) != tuple(x.shape[:2]):
            raise ValueError(
                f"ConditionalModel module: expected a distribution of batch shape {tuple(x.shape[:2])}, tasks and rows "
                f"of x, got {tuple(labels.batch_shape)}; give further dimensions to the event with .to_event(…)"
            )
        return labels

    def posterior(self, *_: object, **__: object) -> NoReturn:
        """There is no φ to have a posterior."""
        raise ValueError(
            "posterior: expected a model with task parameters, got a ConditionalModel, which maps a context to "
            "predictions; use bm.fit(model, tasks).predict(context, x), or write a HierarchicalModel"
        )

    def predict(self, *_: object, **__: object) -> NoReturn:
        """Only a fit predicts."""
        _unfitted("ConditionalModel", "predict")

    def save(self, *_: object, **__: object) -> NoReturn:
        """Only a fit is saved."""
        _unfitted("ConditionalModel", "save")


def _sizes(context: Any) -> tuple[int, int]:
    whole = isinstance(context, (tuple, list)) and len(context) == 2 and all(type(size) is int for size in context)
    if not whole or not 0 <= context[0] <= context[1]:
        raise ValueError(
            f"ConditionalModel: expected context=(smallest, largest), integers with 0 ≤ smallest ≤ largest, "
            f"got {context!r}"
        )
    return context[0], context[1]
