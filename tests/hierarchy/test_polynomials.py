"""Polynomials are told from other functions by their operations."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from scenarios import make_tasks, mixtures, outliers, process, radon
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.polynomials import is_polynomial

Function = Callable[[Tensor, Tensor], Tensor]
LOWER = torch.tensor([[2.0, 0.0], [0.5, 1.0]])
POLYNOMIALS: dict[str, Function] = {
    "line": lambda z, d: 3 - (z * d.exp()).sum(-1) / d.abs().sum(),
    "square": lambda z, d: (z.square() @ d.unsqueeze(-1)).squeeze(-1) - (z[:, 0] - d[0]) ** 2,
    "product": lambda z, d: z[:, 0] * z[:, 1] + torch.einsum("ij,ij->i", z, z),
    "solve": lambda z, d: torch.linalg.solve_triangular(LOWER, z.mT, upper=False).square().sum(0),
    "masked": lambda z, d: torch.where(d > 0, z, 0.0).sum(-1) + torch.zeros_like(z).exp().sum(-1),
    "cube": lambda z, d: z.pow(3.0).sum(-1),
    "centred": lambda z, d: ((z - z.mean(-1, keepdim=True)) * d).sum(-1),
    "padded": lambda z, d: torch.nn.functional.pad(z, (0, 1)).roll(1, -1)[:, 1],
    "matrix": lambda z, d: torch.diag_embed(z).diagonal(dim1=-2, dim2=-1).repeat(2, 1).sum(-1),
    "chosen": lambda z, d: torch.stack([z, z + d], 1)[:, torch.tensor([1, 0])].cumsum(-1).flip(-1)[:, 0, 0],
}
OTHERS: dict[str, Function] = {
    "mixture": lambda z, d: torch.stack([-z.square(), -(z - 9).square()]).logsumexp(0).sum(-1),
    "kink": lambda z, d: z.abs().sum(-1),
    "root": lambda z, d: (z.square() + 1).sqrt().sum(-1),
    "ratio": lambda z, d: d[0] / (z[:, 0] + 9),
    "edge": lambda z, d: torch.where(z > 8, 0.0, z).sum(-1),
    "largest": lambda z, d: z.clamp(max=9).sum(-1),
    "power": lambda z, d: z[:, 0].pow(-1),
    "solved": lambda z, d: torch.linalg.solve_triangular(
        torch.diag_embed(z[0] + 9), d.unsqueeze(-1), upper=False
    ).sum(),
    "rounded": lambda z, d: z[:, 0] + 60.0 * ((z[:, 0] - 8.5) / 0.6).int().bool(),
    "read": lambda z, d: d[z[:, 0].long().clamp(0, 1)] + z[:, 0],
}


def verdict(function: Function) -> bool:
    def some(z: Tensor, d: Tensor) -> Tensor:
        return function(z, d)

    graph = make_fx(some, tracing_mode="real")(torch.ones(3, 2), torch.ones(2))
    leaf: fx.Node = next(node for node in graph.graph.nodes if node.op == "placeholder")
    return is_polynomial(leaf)


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials(name: str) -> None:
    assert verdict(POLYNOMIALS[name])


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    assert not verdict(OTHERS[name])


def counts(batch: Batch) -> None:
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.exp()), obs=batch.y.abs().round())


@pytest.mark.parametrize(
    ("model", "expected"), [(radon, True), (process, True), (outliers, False), (mixtures, False), (counts, False)]
)
def test_densities_of_models(model: Callable[[Batch], None], expected: bool) -> None:
    tasks: Tasks = make_tasks()
    read = TaskDensity(model, tasks)
    noise = torch.zeros(len(tasks), read.structure.task_size, dtype=torch.float64)
    data = read.tensors(tasks.batch(slice(None)))
    args = (read.initial_theta(), noise, data, dict(read.learned.values))
    assert read.log_task.inputs(is_polynomial, *args, eagerly=not expected)[1] is expected
