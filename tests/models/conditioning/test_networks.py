"""A network for each task against networks that carry the summed weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from conditioned import SIZES, D, H, K, N, T, check_by_rows, layout, trunk
from torch import Tensor

from bayesmeta.models.conditioning import Networks


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_each_task_has_its_own_network() -> None:
    f = Networks().build(trunk(), SIZES)

    def one(own: dict[str, Tensor], row: Tensor) -> Tensor:
        net = copy.deepcopy(f.net)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                weight += own[name.replace(".", "_")]
        return net(row)

    check_by_rows(f, one)


def test_blocks_are_the_weights() -> None:
    f = Networks().build(trunk(), SIZES)
    names = ["0_0_weight", "0_0_bias", "1_weight", "1_bias"]
    assert layout(f) == [(n, s, 0.0) for n, s in zip(names, [(H, D), (H,), (K, H), (K,)], strict=True)]


def test_at_zero_all_tasks_have_the_shared_network() -> None:
    shared = trunk()
    f = Networks().build(shared, SIZES)
    phi, x = torch.zeros(T, 1, f.blocks.d), torch.randn(T, N, D)
    torch.testing.assert_close(f(phi, x), f.net[1](shared(x)))


def test_tasks_do_not_reach_each_other() -> None:
    f = Networks().build(trunk(), SIZES)
    phi = torch.randn(T, 1, f.blocks.d, requires_grad=True)
    (slope,) = torch.autograd.grad(f(phi, torch.randn(T, N, D))[1].square().sum(), phi)
    assert (slope[1] != 0).all() and (slope[[0, 2]] == 0).all()
