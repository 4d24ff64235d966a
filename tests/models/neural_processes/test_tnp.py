"""The transformer against one masked square of attention with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neural_tasks import ragged
from torch import Tensor, nn

from bayesmeta.models.neural_processes import tnp

PUBLISHED = 222_082


@pytest.mark.parametrize("near", [True, False])
def test_it_is_one_masked_square_of_attention(near: bool) -> None:
    tasks = ragged((4, 3), dx=2)
    module: Any = tnp.build(tasks, width=8, depth=2, heads=2, near=near).module
    rows, x = module.reader(tasks.batch(slice(None))), torch.randn(2, 3, 2)
    found = module.decode(rows, x)
    known = torch.cat([rows.x, rows.labels, torch.ones(2, 4, 1)], -1)
    asked = torch.cat([x, torch.zeros(2, 3, 2)], -1)
    tokens = torch.cat([module.null.row.expand(2, 1, 8), module.embed(torch.cat([known, asked], 1))], 1)
    seen = torch.cat([torch.ones(2, 1, dtype=torch.bool), rows.kept, torch.zeros(2, 3, dtype=torch.bool)], 1)
    places = torch.cat([rows.x, x], 1)
    for layer in module.layers:
        cost = torch.zeros(2, 2, 8, 8)
        for head in range(2 if near else 0):
            weighted = places * layer.near.log_rate[head].exp().sqrt()
            cost[:, head, 1:, 1:] = torch.cdist(weighted, weighted).square()
        tokens = tokens + _square(layer.attention, layer.before(tokens), seen, cost)
        tokens = tokens + layer.perceptron(layer.between(tokens))
    torch.testing.assert_close(found, module.head(tokens[:, -3:]), rtol=1e-4, atol=1e-5)


def _square(attention: Any, tokens: Tensor, seen: Tensor, cost: Tensor) -> Tensor:
    """All tokens attend to those that are seen, by torch's own multi-head attention."""
    mask = -cost.masked_fill(~seen[:, None, None], torch.inf).flatten(0, 1)
    other = nn.MultiheadAttention(8, 2, batch_first=True)
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        other.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        other.out_proj.load_state_dict(attention.out.state_dict())
    result: Tensor = other(tokens, tokens, tokens, attn_mask=mask, need_weights=False)[0]
    return result


def test_each_new_row_is_on_its_own() -> None:
    tasks = ragged()
    module: Any = tnp.build(tasks, width=8, depth=2).module
    batch, x = tasks.batch(slice(None)), torch.randn(4, 5, 1)
    torch.testing.assert_close(module(batch, x).mean[:, 1:2], module(batch, x[:, 1:2]).mean, rtol=1e-4, atol=1e-5)


def test_no_more_parameters_than_published() -> None:
    module: Any = tnp.build(ragged()).module
    assert 0.9 * PUBLISHED < sum(p.numel() for p in module.parameters()) <= PUBLISHED
