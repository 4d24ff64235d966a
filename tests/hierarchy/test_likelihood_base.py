from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.likelihood_base import Custom, Likelihood, Requirement, as_likelihood, value
from bayesmeta.hierarchy.likelihoods import Normal


class Laplace(Likelihood):
    @property
    def shared(self) -> dict[str, Any]:
        return {"scale": dist.HalfNormal(1.0)}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Any:
        return dist.Laplace(f, shared["scale"])

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        yield Requirement("y", tasks.y, tasks.y < 5, "< 5")


TASKS = Tasks.from_arrays(
    None, [[1.0], [], [2.0, 7.0, 8.0]], columns={"n": [[1], [], [2, 3, 4]]}, names=["a", "b", "c"]
)


def test_one_method_makes_a_likelihood() -> None:
    likelihood = Laplace()
    assert as_likelihood(likelihood) is likelihood
    with pytest.raises(ValueError, match=r"Laplace likelihood: expected y < 5, got 7 in task 'c' \(2 of 4 rows"):
        likelihood.check(TASKS)


def test_a_function_is_a_likelihood_without_requirements() -> None:
    likelihood = as_likelihood(lambda f, shared: dist.Normal(f, shared["s"]))
    batch = TASKS.batch([0, 2])
    outcome = likelihood.distribution(torch.zeros(2, 3), batch, {"s": torch.tensor(2.0)})
    assert isinstance(likelihood, Custom) and likelihood.shared == {} and outcome.stddev[0, 0] == 2.0
    likelihood.check(TASKS)


def test_columns_come_in_the_dtype_of_the_call() -> None:
    batch = TASKS.batch([0, 2])
    torch.set_default_dtype(torch.float64)
    try:
        column = value(batch, "n")
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(column, Tensor) and column.dtype == torch.float64 and value(batch, 0.1) == 0.1


def test_a_class_is_no_likelihood() -> None:
    with pytest.raises(ValueError, match=r"got the class Normal; call it: Normal\(\)"):
        as_likelihood(Normal)
