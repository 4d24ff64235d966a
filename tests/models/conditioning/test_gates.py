"""Gated features of each task, row by row, and the two ends: open and closed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from conditioned import SIZES, H, K, N, T, check_by_rows, drawn, layout, trunk
from torch import Tensor

from bayesmeta.models.conditioning import Gates, Heads


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_gated_heads() -> None:
    f = Gates().build(trunk(), SIZES)

    def one(own: dict[str, Tensor], row: Tensor) -> Tensor:
        h = f.trunk(row)
        logits = own["slope"] * (f.gate.weight @ h + f.gate.bias) + own["offset"]
        opened = [value / (1 + math.exp(-logit)) for value, logit in zip(h, logits.tolist(), strict=True)]
        return own["weight"] @ torch.stack(opened) + own["bias"]

    check_by_rows(f, one)


def test_blocks() -> None:
    head = [("weight", (K, H), None), ("bias", (K,), None)]
    assert layout(Gates().build(trunk(), SIZES)) == [("slope", (H,), 1.0), ("offset", (H,), 0.0), *head]


@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_open_gates_are_heads_and_closed_ones_their_biases(offset: float) -> None:
    shared = trunk()
    f, heads = Gates().build(shared, SIZES), Heads().build(shared, SIZES)
    phi, _, x = drawn(f)
    phi[..., :H], phi[..., H : 2 * H] = 0.0, offset
    plain = heads(phi[..., 2 * H :], x)
    torch.testing.assert_close(f(phi, x), plain if offset > 0 else phi[..., -K:].expand(T, N, K))
