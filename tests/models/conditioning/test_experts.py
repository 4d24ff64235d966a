"""Mixtures of trunks, row by row, with gates that depend on x and gates that do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conditioned import SIZES, H, K, check_by_rows, drawn, layout, trunk
from torch import Tensor, nn

from bayesmeta.models.conditioning import Experts, Heads


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


HEADS = [("weight", (K, H), None), ("bias", (K,), None)]


@pytest.mark.parametrize("inputs", [0, 2])
def test_a_weighted_mean_of_experts(inputs: int) -> None:
    f = Experts(count=3, inputs=inputs).build(trunk(), SIZES)

    def one(own: dict[str, Tensor], row: Tensor) -> Tensor:
        odds = (own["gate"] + own["gate_slope"] @ row if inputs else own["gate"]).exp()
        mean = sum(odds[e] / odds.sum() * expert(row) for e, expert in enumerate(f.experts))
        return own["weight"] @ mean + own["bias"]

    check_by_rows(f, one)
    slopes = [("gate_slope", (3, 2), 0.0)] if inputs else []
    assert layout(f) == [("gate", (3,), 0.0), *slopes, *HEADS]


def test_experts_are_copies_of_the_trunk_with_weights_of_their_own() -> None:
    shared = trunk()
    f = Experts(count=3).build(shared, SIZES)
    assert f.experts[0] is shared and len(f.experts) == 3
    weights = torch.stack([expert[0].weight for expert in f.experts])
    assert all(not torch.isclose(weights[i], weights[j]).any() for i in range(3) for j in range(i))


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_gate_may_choose_one_expert(chosen: int) -> None:
    f = Experts(count=2).build(trunk(), SIZES)
    phi, _, x = drawn(f)
    phi[..., :2] = torch.tensor([-40.0, 40.0] if chosen else [40.0, -40.0])
    torch.testing.assert_close(f(phi, x), Heads().build(f.experts[chosen], SIZES)(phi[..., 2:], x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "Experts: expected count as a whole number ≥ 1, got 0"),
        ({"count": 1.5}, "Experts: expected count as a whole number ≥ 1, got 1.5"),
        ({"inputs": -1}, "Experts: expected inputs as a whole number ≥ 1, got -1"),
    ],
)
def test_options_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(**options)


def test_a_trunk_without_weights_has_no_experts() -> None:
    with pytest.raises(ValueError, match="experts: expected a trunk with weights, got one without"):
        Experts().build(nn.Sequential(nn.Tanh(), nn.Flatten(2)), SIZES)
