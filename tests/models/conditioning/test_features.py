"""Codes, gains and shifts inside a shared network, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conditioned import SIZES, D, H, N, T, check_by_rows, layout, trunk

from bayesmeta.models.conditioning import Additive, Concat, Conditioning, FiLM, Multiplicative


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_concat() -> None:
    f = Concat(size=3).build(trunk(), SIZES)
    check_by_rows(f, lambda own, row: f.head(torch.tanh(f.layer(torch.cat([f.trunk(row), own["z"]])))))
    assert layout(f) == [("z", (3,), 0.0)]


def test_additive() -> None:
    f = Additive(size=3).build(trunk(), SIZES)
    w, b, v = f.layer.weight, f.layer.bias, f.code.weight
    check_by_rows(f, lambda own, row: f.head(torch.tanh(w @ f.trunk(row) + b + v @ own["z"])))
    assert layout(f) == [("z", (3,), 0.0)] and f.code.bias is None


def test_multiplicative() -> None:
    f = Multiplicative().build(trunk(), SIZES)
    check_by_rows(f, lambda own, row: f.head.weight @ torch.diag(own["scale"]) @ f.trunk(row) + f.head.bias)
    assert layout(f) == [("scale", (H,), 1.0)]


def test_film() -> None:
    f = FiLM().build(trunk(), SIZES)
    check_by_rows(f, lambda own, row: f.head.weight @ (own["scale"] * f.trunk(row) + own["shift"]) + f.head.bias)
    assert layout(f) == [("scale", (H,), 1.0), ("shift", (H,), 0.0)]


@pytest.mark.parametrize("options", [Multiplicative(), FiLM()])
def test_at_the_centres_there_is_one_function(options: Conditioning) -> None:
    f = options.build(trunk(), SIZES)
    phi, x = f.blocks.centre({}).expand(T, 1, -1), torch.randn(T, N, D)
    torch.testing.assert_close(f(phi, x), f.head(f.trunk(x)))


@pytest.mark.parametrize("kind", [Concat, Additive])
@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_sizes_are_whole_numbers(kind: type, size: object) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected size as a whole number ≥ 1, got {size!r}"):
        kind(size=size)
