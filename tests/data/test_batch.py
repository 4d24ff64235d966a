from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks

X = [[[0.0], [1.0], [2.0]], [[3.0]]]
Y = [[1.0, 2.0, 4.0], [8.0]]


def batch_of(**changes: object) -> Batch:
    return Tasks.from_arrays(**({"x": X, "y": Y} | changes)).batch([0, 1])  # type: ignore[arg-type]


def model(batch: Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi + batch.x[..., 0], 1.0), obs=batch.y)


def densities(function: object, batch: Batch, phi: Tensor) -> dict[str, Tensor]:
    mu = torch.tensor(0.3, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(function, {"mu": mu, "phi": phi})).get_trace(batch)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in trace.stochastic_nodes + trace.observation_nodes}


PHI = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)


def expected() -> Tensor:
    """The log density of each row, by hand; padding is zero."""
    rows = [
        [
            float(dist.Normal(phi + x[0], 1.0).log_prob(torch.tensor(y, dtype=torch.float64)))
            for x, y in zip(xs, ys, strict=True)
        ]
        for phi, xs, ys in zip((0.5, -0.5), X, Y, strict=True)
    ]
    return torch.tensor([row + [0.0] * (3 - len(row)) for row in rows], dtype=torch.float64)


def test_shapes_and_access() -> None:
    batch = batch_of(columns={"trials": [[5, 5, 5], [6]]}, task_columns={"u": [1.5, 2.5]})
    assert batch.x.shape == (2, 3, 1) and batch.y.shape == batch.mask.shape == batch.observed.shape == (2, 3)
    assert batch.n.tolist() == [3, 1] and batch.names == ("0", "1") and len(batch) == 2
    assert batch["trials"].tolist() == [[5, 5, 5], [6, 6, 6]] and batch["trials"].dtype == torch.int64
    assert batch["u"].tolist() == [[1.5], [2.5]]
    assert batch["x0"].tolist() == [[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]
    with pytest.raises(ValueError, match="unknown column 'trails'; known: 'trials', 'u', 'x0'. Did you mean 'trials'?"):
        batch["trails"]


def test_padding_is_masked() -> None:
    found = densities(model, batch_of(), PHI)["y"]
    torch.testing.assert_close(found, expected(), rtol=1e-12, atol=0)


def test_padding_further_changes_nothing() -> None:
    tasks = Tasks.from_arrays(X, Y)
    wide = densities(model, tasks.batch([0, 1], rows=7), PHI)["y"]
    assert wide.shape == (2, 7)
    torch.testing.assert_close(wide.sum(1), expected().sum(1), rtol=1e-12, atol=0)


def test_missing_labels_are_masked() -> None:
    batch = batch_of(y=[[1.0, float("nan"), 4.0], [8.0]], missing="mask")
    found = densities(model, batch, PHI)["y"]
    want = expected()
    want[0, 1] = 0.0
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


def test_weights_scale_only_what_is_observed() -> None:
    batch = batch_of(weight=[[1.0, 2.0, 0.5], [3.0]], task_weight=[1.0, 10.0])
    found = densities(model, batch, PHI)
    scale = torch.tensor([[1.0, 2.0, 0.5], [30.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found["y"], expected() * scale, rtol=1e-12, atol=0)
    plain = densities(model, batch_of(), PHI)
    assert torch.equal(found["phi"], plain["phi"]) and torch.equal(found["mu"], plain["mu"])


def test_task_weights_scale_factors_in_the_plate() -> None:
    def with_factor(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.factor("f", -(phi**2))

    found = densities(with_factor, batch_of(task_weight=[2.0, 3.0]), PHI)["f"]
    assert found.flatten().tolist() == [-0.5, -0.75]


def test_rows_where_masks_the_other_kind() -> None:
    def mixed(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            with batch.observations():
                with batch.rows_where("kind", "scan"):
                    pyro.sample("scan", dist.Normal(phi + batch.x[..., 0], 1.0), obs=batch.y)
                with batch.rows_where("kind", "count"):
                    pyro.sample("count", dist.Poisson(phi.exp()), obs=batch.y)

    batch = batch_of(columns={"kind": [["scan", "count", "scan"], ["count"]]})
    found = densities(mixed, batch, PHI)
    want = expected() * torch.tensor([[1, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(found["scan"], want, rtol=1e-12, atol=0)
    assert (found["count"] != 0).int().tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="the level 'pet' was not seen before; known levels: 'count', 'scan'"):
        batch.rows_where("kind", "pet")
    with pytest.raises(ValueError, match="unknown column 'sort'"):
        batch.rows_where("sort", "scan")


def test_rows_where_compares_numbers() -> None:
    batch = batch_of(columns={"visit": [[1, 2, 1], [2]]})
    with batch.rows_where("visit", 2):
        pass
    with pytest.raises(ValueError, match="holds numbers, got the text '2'"):
        batch.rows_where("visit", "2")


def test_outputs() -> None:
    nan = float("nan")
    batch = batch_of(y=[[[1.0, nan], [2.0, 5.0], [3.0, 6.0]], [[nan, 7.0]]], missing="mask")
    y, ok = batch.output(1)
    assert y.tolist() == [[5.0, 5.0, 6.0], [7.0, 7.0, 7.0]]
    assert ok.int().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert torch.equal(batch.output("y1")[0], y) and torch.equal(batch.output(-1)[1], ok)
    for wrong in ("y2", 2, -3):
        with pytest.raises(
            ValueError, match=f"unknown output {wrong!r}; known: 'y0', 'y1'.* Outputs are counted 0 … 1"
        ):
            batch.output(wrong)


def test_the_only_output() -> None:
    batch = batch_of()
    assert batch.output(0)[0] is batch.y and batch.output("y")[1] is batch.observed


def test_two_outputs_with_their_own_masks() -> None:
    def two(batch: Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            with batch.observations():
                for k in range(2):
                    y, ok = batch.output(k)
                    with poutine.mask(mask=ok):
                        pyro.sample(f"y{k}", dist.Normal(phi, 1.0), obs=y)

    nan = float("nan")
    batch = batch_of(y=[[[1.0, nan], [2.0, 5.0], [3.0, 6.0]], [[nan, 7.0]]], missing="mask")
    found = densities(two, batch, PHI)
    assert (found["y0"] != 0).int().tolist() == [[1, 1, 1], [0, 0, 0]]
    assert (found["y1"] != 0).int().tolist() == [[0, 1, 1], [1, 0, 0]]


def test_only_one_output_is_the_batch_of_that_output() -> None:
    nan = float("nan")
    columns, weight = {"k": [[1, 2, 3], [4]]}, [[1.0, 2.0, 0.5], [3.0]]
    both = batch_of(
        y=[[[1.0, nan], [2.0, 5.0], [3.0, 6.0]], [[nan, 7.0]]], missing="mask", columns=columns, weight=weight
    )
    alone = batch_of(y=[[nan, 5.0, 6.0], [7.0]], missing="mask", columns=columns, weight=weight)
    for k in (1, "y1", -1):
        one = both.only(k)
        assert torch.equal(one.observed, alone.observed) and one.names == both.names
        assert one.schema.y == ("y1",) and one.schema.y_shape == () and one.schema.missing
        found = densities(model, one, PHI)["y"]
        torch.testing.assert_close(found, densities(model, alone, PHI)["y"], rtol=1e-12, atol=0)
        assert torch.equal(found != 0, torch.tensor([[False, True, True], [True, False, False]]))
    assert both.y.shape == (2, 3, 2) and both.schema.y == ("y0", "y1")
    with pytest.raises(ValueError, match="unknown output 2; known: 'y0', 'y1'"):
        both.only(2)
    single = batch_of()
    assert single.only("y").y is single.y and single.only(0).schema is single.schema


def test_only_of_outputs_that_are_matrices() -> None:
    y = [torch.arange(18.0).reshape(3, 2, 3).tolist(), [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]]
    one = batch_of(y=y).only(1)
    assert one.y[0].tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0], [15.0, 16.0, 17.0]]
    assert one.observed.shape == (2, 3, 3) and (one.schema.y, one.schema.y_shape) == (("y1",), (3,))


def test_where_masks_the_other_rows() -> None:
    batch = batch_of(columns={"kind": [["scan", "count", "scan"], ["count"]]}, task_columns={"u": [1.5, 2.5]})
    scans, counts = batch.where("kind", "scan"), batch.where("kind", "count")
    assert scans.mask.tolist() == [[True, False, True], [False] * 3]
    assert counts.mask.tolist() == [[False, True, False], [True, False, False]]
    keep = torch.tensor([[1.0, 0.0, 1.0], [0.0] * 3])
    torch.testing.assert_close(densities(model, scans, PHI)["y"], expected() * keep, rtol=1e-12, atol=0)
    total = densities(model, scans, PHI)["y"] + densities(model, counts, PHI)["y"]
    torch.testing.assert_close(total, expected(), rtol=1e-12, atol=0)
    assert batch.where("u", 2.5).mask.tolist() == [[False] * 3, [True, False, False]]
    assert batch.where("x0", 1.0).mask.tolist() == [[False, True, False], [False] * 3]
    assert scans.where("x0", 0.0).mask.tolist() == [[True, False, False], [False] * 3]
    assert batch.mask.sum() == 4 and scans.y is batch.y and scans.schema is batch.schema
    with pytest.raises(ValueError, match="the level 'pet' was not seen before; known levels: 'count', 'scan'"):
        batch.where("kind", "pet")
    with pytest.raises(ValueError, match="unknown column 'sort'"):
        batch.where("sort", "scan")


def test_everything_comes_from_the_tensors() -> None:
    batch = batch_of(weight=[[1.0, 2.0, 0.5], [3.0]])
    twice = batch.replace(
        {key: value * 2 if value.is_floating_point() else value for key, value in batch.tensors.items()}
    )
    assert twice.names == batch.names and torch.equal(twice.y, 2 * batch.y)
    found = densities(model, twice, PHI)["y"]
    by_hand = dist.Normal(PHI + 2 * batch.x[..., 0], 1.0).log_prob(2 * batch.y) * 2 * batch.tensors["weight"]
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0)


def test_a_batch_can_be_recorded_and_fed_again() -> None:
    batch = batch_of(weight=[[1.0, 2.0, 0.5], [3.0]], task_weight=[1.0, 2.0])

    def total(tensors: dict[str, Tensor], phi: Tensor) -> Tensor:
        return densities(model, batch.replace(tensors), phi)["y"].sum()

    with pyro.validation_enabled(False):
        graph = make_fx(total)(batch.tensors, PHI)
    other = {key: value + 1 if key == "y" else value for key, value in batch.tensors.items()}
    assert graph(other, PHI + 1).item() == pytest.approx(total(other, PHI + 1).item(), rel=1e-12)


def test_to_casts_floats_only() -> None:
    batch = batch_of(columns={"k": [[1, 2, 3], [4]]}).to(dtype=torch.float32)
    assert batch.x.dtype == batch.y.dtype == torch.float32
    assert batch["k"].dtype == torch.int64 and batch.mask.dtype == torch.bool
