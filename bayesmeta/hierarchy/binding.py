"""How functions and distributions written by users enter the components.

Functions get their arguments by name, whatever their order; distributions become Pyro distributions in the dtype of the
call. Nothing here knows a prior or a likelihood; ``priors.py``, ``likelihoods.py`` and ``model.py`` call it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, cast

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import _InverseTransform

_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_BY_PLACE = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def bind(function: Callable[..., Any], *, role: str, names: tuple[str, ...], positional: int = 0) -> Callable[..., Any]:
    """Wraps `function` as a callable of the keywords `names`, which passes on those that its signature asks for.

    A function whose required arguments all carry names on offer gets them by name. Otherwise its first arguments get
    the first `positional` of `names`, whatever it calls them, and the others are bound by name. One without arguments
    gets none.

    Args:
        function: any callable; an `nn.Module` is read by its `forward`.
        role: what the function is ("likelihood"), for the error.
        names: the values on offer.
        positional: how many of them may be passed by place.

    Returns:
        A callable `(**values) -> function(...)`; `values` has a key for each of `names`.

    Raises:
        ValueError: if `function` is not callable, or requires an argument that is not on offer.
    """
    parameters = _parameters(function, role=role, names=names)
    lead, keywords = _plan(parameters, names, positional)
    placed = _named(parameters, _BY_PLACE)[: len(lead)]
    surplus = sorted(_required(parameters) - {*placed, *keywords})
    if surplus:
        raise ValueError(
            f"{role}: expected arguments among ({', '.join(names)}), got a function that requires {surplus}; "
            "rename them, or give them a default value"
        )
    if len(placed) < len(lead) and not _named(parameters, (Parameter.VAR_POSITIONAL,)):
        taken = _named(parameters, _BY_NAME)
        raise ValueError(f"{role}: expected a callable of ({', '.join(names)}), got one that takes {taken}")
    return functools.partial(_call, function, lead, keywords)


def _plan(
    parameters: list[Parameter], names: tuple[str, ...], positional: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which names go by place, in their order, and which by name."""
    named, required = set(_named(parameters, _BY_NAME)), _required(parameters)
    offered = named & set(names)
    by_name = bool(offered) and required <= offered
    lead = () if by_name or not parameters else names[:positional]
    if positional == 0 and _named(parameters, (Parameter.VAR_KEYWORD,)):
        named = set(names)
    taken = {*lead, *_named(parameters, _BY_PLACE)[: len(lead)]}
    return lead, tuple(name for name in names if name in named - taken)


def _named(parameters: list[Parameter], kinds: tuple[Any, ...]) -> list[str]:
    return [p.name for p in parameters if p.kind in kinds]


def _required(parameters: list[Parameter]) -> set[str]:
    return {p.name for p in parameters if p.default is p.empty and p.kind not in _VARIADIC}


def _call(function: Callable[..., Any], lead: tuple[str, ...], keywords: tuple[str, ...], /, **values: Any) -> Any:
    return function(*(values[name] for name in lead), **{name: values[name] for name in keywords})


def _parameters(function: Callable[..., Any], *, role: str, names: tuple[str, ...]) -> list[Parameter]:
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"{role}: expected a callable of ({', '.join(names)}), got {function!r}")
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{role}: {function!r} has no readable signature; wrap it in a Python function") from error


def as_pyro(distribution: Any, *, role: str) -> Distribution:
    """Returns a torch or Pyro distribution as one that Pyro can sample.

    Args:
        distribution: what a user's function returned.
        role: where it came from, for the error.

    Raises:
        ValueError: if it is no distribution.
    """
    if not isinstance(distribution, Distribution):
        raise ValueError(f"{role}: expected a torch or Pyro distribution, got {type(distribution).__name__}")
    if isinstance(distribution, TorchDistributionMixin):
        return distribution
    wrapped, plain = copy.copy(distribution), cast(Any, type(distribution))
    wrapped.__class__ = _pyro_class(plain)
    return wrapped


@functools.lru_cache(maxsize=256)
def _pyro_class(cls: Any) -> Any:
    return type(cls.__name__, (cls, TorchDistributionMixin), {"__module__": cls.__module__})


def in_default_dtype(value: Any) -> Any:
    """Casts the floating tensors of a distribution built outside the call to the default dtype of the call.

    Args:
        value: a distribution; transforms, tensors and sequences of these inside it are followed.

    Returns:
        A copy. A number that was rounded to float32 stays so; build the distribution in a function to avoid that.
    """
    if isinstance(value, Tensor):
        return value.to(torch.get_default_dtype()) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(map(in_default_dtype, value))
    if isinstance(value, _InverseTransform):
        return in_default_dtype(value.inv).inv
    if isinstance(value, (Distribution, Transform)) and not isinstance(value, nn.Module):
        return _cast_parts(value)
    return value


def _cast_parts(value: Any) -> Any:
    clone = copy.copy(value)
    # A transform and its cached inverse point at each other.
    parts = {name: None if name == "_inv" else in_default_dtype(part) for name, part in vars(value).items()}
    clone.__dict__.update(parts)
    return clone
