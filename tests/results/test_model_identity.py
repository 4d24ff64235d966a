"""The identity of a model: the same model has the same, every change of it is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scenarios import Scenario, make_tasks, scenarios
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.results.model_identity import buffers, check_densities, check_model, identity, plain, with_tried


def model(
    *, name: str = "phi", size: int = 2, scale: float = 1.0, swapped: bool = False, net: nn.Module | None = None
) -> Callable[[Batch], None]:
    def function(batch: Batch) -> None:
        sites = {"mu": dist.Normal(0.0, 2.0), "nu": dist.Normal(0.0, 1.0)}
        for key in reversed(sites) if swapped else sites:
            pyro.sample(key, sites[key])
        with batch.tasks():
            phi = pyro.sample(name, dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            mean = phi[..., 0] + (0.0 if net is None else net(batch.x).squeeze(-1))
            with batch.observations():
                pyro.sample("y", dist.Normal(mean, scale), obs=batch.y)

    return function


def read(function: Any) -> TaskDensity:
    return TaskDensity(function, make_tasks())


def stored(density: TaskDensity) -> dict[str, Any]:
    return json.loads(json.dumps(identity(density, density.learned.values)))


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda scenario: scenario.name)
def test_a_model_is_itself(scenario: Scenario) -> None:
    density = TaskDensity(scenario.model, scenario.tasks)
    meta = stored(density)
    again = TaskDensity(scenario.model, scenario.tasks)
    check_model("f.bm", meta, again)
    check_densities("f.bm", meta, again, again.learned.values)
    assert with_tried(again, meta["tried"]) == density.structure


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            {"name": "psi"},
            "task site 'phi' is missing here; task site 'psi' is not in the file; give the model",
        ),
        ({"size": 3}, r"task site 'phi' has shape \(2,\) in the file, \(3,\) here"),
        ({"swapped": True}, r"the order of the shared sites is \['mu', 'nu'\] in the file, \['nu', 'mu'\] here"),
    ],
)
def test_other_sites_are_named(other: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_model("f.bm", stored(read(model())), read(model(**other)))


def test_another_density_is_named() -> None:
    meta, other = stored(read(model())), read(model(scale=1.5))
    check_model("f.bm", meta, other)
    with pytest.raises(ValueError, match=r"site 'y' has another density than in the fit \(log density -"):
        check_densities("f.bm", meta, other, {})


def test_frozen_weights_are_compared_bit_by_bit() -> None:
    net = nn.Linear(2, 1).requires_grad_(False)
    meta = stored(read(model(net=net)))
    check_model("f.bm", meta, read(model(net=copy.deepcopy(net))))
    with torch.no_grad():
        net.weight[0, 0] += 1e-7
    with pytest.raises(ValueError, match=r"frozen parameters that the model captures .* \(2 in the file, 2 here\)"):
        check_model("f.bm", meta, read(model(net=net)))


class Scaled(nn.Module):
    """A layer with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.scale


def test_point_estimates_are_those_of_the_state() -> None:
    net = nn.Sequential(nn.Linear(2, 1), Scaled())

    def function(batch: Batch) -> None:
        pyro.module("net", net)
        model(net=net)(batch)

    density = read(function)
    before = {name: value.clone() for name, value in density.learned.values.items()}
    moved = {name: value + 0.5 for name, value in density.learned.values.items()}
    meta = json.loads(json.dumps(identity(density, moved)))
    assert all(torch.equal(value, before[name]) for name, value in density.learned.values.items())
    check_densities("f.bm", meta, density, moved)
    with pytest.raises(ValueError, match="another density"):
        check_densities("f.bm", meta, density, before)
    assert [name for name, _ in buffers(density)] == [f"net.{name}" for name, _ in net.named_buffers()]


def test_scalars_become_pythons_own() -> None:
    found = plain({"a": (torch.tensor(True), 1.5), "b": [torch.tensor(2)]})
    assert found == {"a": [True, 1.5], "b": [2]} and type(found["a"][0]) is bool
