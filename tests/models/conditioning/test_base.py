"""φ is cut and handed on, each task's linear layer is its own, and copies have weights of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conditioned import D, H, K, N, T
from torch import Tensor, nn

from bayesmeta.models.conditioning.base import Conditioned, anew, linear
from bayesmeta.models.sharing import Block, Blocks


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Line(Conditioned):
    blocks = Blocks((Block("slope", (1, D)), Block("level", (1,), 0.0)))

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        return linear(x, parts["slope"], parts["level"])


@pytest.mark.parametrize("scalar", [False, True])
def test_blocks_reach_evaluate(scalar: bool) -> None:
    function, phi, x = Line(), torch.randn(T, 1, D + 1), torch.randn(T, N, D)
    function.scalar = scalar
    want = torch.stack([x[i] @ phi[i, 0, :D] + phi[i, 0, D] for i in range(T)])
    torch.testing.assert_close(function(phi, x), want if scalar else want.unsqueeze(-1))


def test_linear_layers_of_each_task() -> None:
    h, weight, bias = torch.randn(T, N, H), torch.randn(T, 1, K, H), torch.randn(T, 1, K)
    want = torch.stack([nn.functional.linear(h[i], weight[i, 0], bias[i, 0]) for i in range(T)])
    torch.testing.assert_close(linear(h, weight, bias), want)


def test_what_evaluates_nothing_says_so() -> None:
    function = Conditioned()
    function.blocks = Blocks((Block("z", (1,)),))
    with pytest.raises(NotImplementedError):
        function(torch.zeros(T, 1, 1), torch.zeros(T, N, D))


def test_copies_have_weights_of_their_own() -> None:
    module = nn.Sequential(nn.Linear(D, H), nn.Sequential(nn.Tanh(), nn.Linear(H, 100)))
    before = [weight.clone() for weight in module.parameters()]
    fresh = anew(module)
    for old, kept, new in zip(module.parameters(), before, fresh.parameters(), strict=True):
        assert torch.equal(old, kept) and new.shape == old.shape
        assert not torch.isclose(old, new).any() and new.data_ptr() != old.data_ptr()
    deep = fresh[1][1].weight
    assert deep.abs().max() <= H**-0.5 and deep.std().item() == pytest.approx((3 * H) ** -0.5, rel=0.15)
