"""Random numbers in recorded graphs: new ones in every call and in every slice, also where torch fills in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bayesmeta.hierarchy.random_graphs import check_noise, independent_fills
from bayesmeta.hierarchy.recording import Recorded

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda x: x + torch.randn(3),
    "normal": lambda x: x + torch.empty(3).normal_(),
    "uniform": lambda x: x + torch.empty(3).uniform_(-1, 1),
    "exponential": lambda x: x + torch.empty(3).exponential_(),
    "cauchy": lambda x: x + torch.empty(3).cauchy_(),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_graphs_draw_anew_in_every_call_and_slice(draw: str) -> None:
    recorded = Recorded(DRAWS[draw], random=True)
    x = torch.zeros(4, 3)
    drawn = torch.cat([recorded.mapped(x, in_dims=(0,)), recorded.mapped(x, in_dims=(0,)), recorded(x[0])[None]])
    assert len(drawn.unique()) == drawn.numel()
    assert set(recorded.status.values()) == {"recorded"}


def test_fills_keep_their_arguments() -> None:
    table = independent_fills()
    graph = make_fx(lambda x: torch.ops.aten.uniform(x, 2.0, 3.0), decomposition_table=table)(torch.zeros(1000))
    drawn = graph(torch.zeros(1000))
    assert 2.0 <= float(drawn.min()) < 2.1 and 2.9 < float(drawn.max()) <= 3.0


def test_a_mapped_graph_that_would_repeat_its_numbers_is_refused() -> None:
    one = make_fx(lambda x: x + torch.randn(3))(torch.zeros(3))
    good = make_fx(lambda x: x + torch.randn(4, 3))(torch.zeros(4, 3))
    bad = make_fx(lambda x: x + torch.randn(3))(torch.zeros(4, 3))
    check_noise(one, good, 4)
    with pytest.raises(RuntimeError, match="repeat random numbers"):
        check_noise(one, bad, 4)
