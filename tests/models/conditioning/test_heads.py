"""Heads of the tasks on one trunk, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conditioned import SIZES, D, H, K, N, T, check_by_rows, drawn, layout, trunk
from torch import nn

from bayesmeta.models.conditioning import Heads
from bayesmeta.models.conditioning.base import Sizes
from bayesmeta.models.conditioning.heads import head_blocks
from bayesmeta.models.sharing import Block


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_each_task_has_its_own_head() -> None:
    shared = trunk()
    function = Heads().build(shared, SIZES)
    check_by_rows(function, lambda own, row: own["weight"] @ shared(row) + own["bias"])
    assert {id(weight) for weight in function.parameters()} == {id(weight) for weight in shared.parameters()}


def test_blocks_of_a_head() -> None:
    head = [("weight", (K, H), None), ("bias", (K,), None)]
    assert layout(Heads().build(trunk(), SIZES)) == head
    before = Block("gate", (3,), 0.0)
    assert head_blocks(SIZES, before).all[0] is before and head_blocks(SIZES, before).d == 3 + K * (H + 1)


def test_without_a_trunk_it_is_linear_regression() -> None:
    function = Heads().build(nn.Identity(), Sizes(D, 1))
    function.scalar = True
    phi, _, x = drawn(function)
    design = torch.cat([x, torch.ones(T, N, 1)], -1)
    torch.testing.assert_close(function(phi, x), (design @ phi.mT).squeeze(-1))
