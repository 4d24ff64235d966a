from __future__ import annotations

import functools
import math
import operator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bayesmeta.hierarchy.binding import as_pyro, bind, in_default_dtype

NAMES = ("phi", "x", "batch", "shared")
VALUES = {"phi": "P", "x": "X", "batch": "B", "shared": "S"}


def accepts_all(**kwargs: Any) -> Any:
    return sorted(kwargs)


def undecorated(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def positional_only(phi: str, x: str, /, batch: str) -> Any:
    return phi, x, batch


class Module(nn.Module):
    def forward(self, phi: str, x: str, shared: str) -> Any:
        return phi, x, shared


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda phi, x: (phi, x), ("P", "X")),
        (lambda x, phi: (x, phi), ("X", "P")),
        (lambda a, b: (a, b), ("P", "X")),
        (lambda phi, t: (phi, t), ("P", "X")),
        (lambda a, b, batch: (a, b, batch), ("P", "X", "B")),
        (lambda a, b, *, shared, k=3: (a, b, shared, k), ("P", "X", "S", 3)),
        (lambda phi: phi, "P"),
        (lambda phi, batch: (phi, batch), ("P", "B")),
        (lambda a=1, b=2: (a, b), ("P", "X")),
        (lambda: "nothing", "nothing"),
        (functools.partial(lambda k, a, b: (k, a, b), 7), (7, "P", "X")),
        (positional_only, ("P", "X", "B")),
        (undecorated, (("P", "X"), {})),
        (operator.add, "PX"),
        (Module(), ("P", "X", "S")),
    ],
)
def test_two_leading_arguments_go_by_place_or_by_name(function: Any, expected: Any) -> None:
    assert bind(function, role="predictor", names=NAMES, positional=2)(**VALUES) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda shared, phi: (shared, phi), ("S", "P")),
        (lambda: "nothing", "nothing"),
        (lambda phi, scale=2: (phi, scale), ("P", 2)),
        (accepts_all, sorted(NAMES)),
    ],
)
def test_without_places_only_names_count(function: Any, expected: Any) -> None:
    assert bind(function, role="likelihood", names=NAMES)(**VALUES) == expected


def test_unknown_required_argument_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"likelihood: expected arguments among \(phi, x.*requires \['sigma'\].*rename"
    ):
        bind(lambda phi, sigma: phi, role="likelihood", names=NAMES)
    with pytest.raises(ValueError, match=r"predictor: .*requires \['c'\]"):
        bind(lambda a, b, c: a, role="predictor", names=NAMES, positional=2)
    with pytest.raises(ValueError, match=r"predictor: expected a callable of \(phi, x"):
        bind(lambda a: a, role="predictor", names=NAMES, positional=2)


@pytest.mark.parametrize("thing", [3, "likelihood", nn.Linear, None])
def test_what_is_no_function_is_refused(thing: Any) -> None:
    with pytest.raises(ValueError, match="prior: expected a callable of"):
        bind(thing, role="prior", names=NAMES)


def test_a_function_without_signature_is_refused() -> None:
    with pytest.raises(ValueError, match="no readable signature; wrap it"):
        bind(torch.add, role="predictor", names=NAMES, positional=2)


def test_torch_distributions_become_pyro_distributions() -> None:
    plain = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3, 2), 1.0), 1)
    with pyro.plate("rows", 3):
        value = pyro.sample("y", as_pyro(plain, role="prior"))
    assert value.shape == (3, 2)
    assert type(plain) is torch.distributions.Independent
    assert as_pyro(plain, role="prior").mask(False).log_prob(value).tolist() == [0.0, 0.0, 0.0]
    expanded = as_pyro(torch.distributions.StudentT(torch.tensor(3.0)), role="prior").expand([2])
    assert expanded.event_dim == 0 and expanded.sample().shape == (2,)


def test_pyro_distributions_stay_what_they_are() -> None:
    normal = dist.Normal(0.0, 1.0)
    assert as_pyro(normal, role="prior") is normal
    with pytest.raises(ValueError, match="prior: expected a torch or Pyro distribution, got float"):
        as_pyro(3.0, role="prior")


def frozen_early() -> list[Any]:
    return [
        dist.Gamma(2.0, 0.25),
        dist.HalfNormal(0.5).expand([3]).to_event(1),
        dist.LKJCholesky(3, 1.0),
        dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2) * 0.5),
        dist.LogNormal(0.5, 2.0),
        dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [dist.transforms.OrderedTransform()]),
        dist.Weibull(0.5, 2.0),
        dist.TransformedDistribution(dist.Gamma(2.0, 0.25), [dist.transforms.AffineTransform(0.25, 0.5).inv]),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2))),
    ]


@pytest.mark.parametrize("which", range(len(frozen_early())))
def test_distributions_built_early_are_cast(which: int) -> None:
    early = frozen_early()[which]
    before = early.log_prob(early.sample())
    torch.set_default_dtype(torch.float64)
    try:
        late = in_default_dtype(early)
        value = late.sample()
        exact = frozen_early()[which]
        assert value.dtype == torch.float64
        torch.testing.assert_close(late.log_prob(value), exact.log_prob(value), rtol=0, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert before.dtype == torch.float32 and early.sample().dtype == torch.float32


def test_casting_keeps_gradients_and_other_types() -> None:
    weight = nn.Parameter(torch.tensor(0.5))
    torch.set_default_dtype(torch.float64)
    try:
        density: Tensor = in_default_dtype(dist.Normal(weight, 1.0)).log_prob(torch.tensor(2.0))
    finally:
        torch.set_default_dtype(torch.float32)
    density.backward()
    assert weight.grad is not None and math.isclose(weight.grad.item(), 1.5)
    assert in_default_dtype("a name") == "a name" and in_default_dtype(torch.tensor([1])).dtype == torch.int64
