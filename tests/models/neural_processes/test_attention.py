"""Attention against a loop over heads and rows."""

from __future__ import annotations

import math

import pytest
import torch

from bayesmeta.models.neural_processes.attention import Attention, Nearness, Null


def test_it_is_a_softmax_over_the_kept_rows() -> None:
    attention = Attention(6, heads=2)
    queries, keys, values = torch.randn(2, 3, 6), torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    kept = torch.tensor([[True, True, False, True], [True, False, False, False]])
    found = attention(queries, keys, values, kept[:, None, None])
    q, k, v = attention.query(queries), attention.key(keys), attention.value(values)
    for task in range(2):
        for row in range(3):
            heads = []
            for part in (slice(0, 3), slice(3, 6)):
                score = k[task, kept[task]][:, part] @ q[task, row, part] / math.sqrt(3)
                heads.append(score.softmax(0) @ v[task, kept[task]][:, part])
            torch.testing.assert_close(found[task, row], attention.out(torch.cat(heads)))


def test_an_empty_set_is_answered_by_the_null_row() -> None:
    null, attention = Null(4), Attention(4, heads=1)
    rows, kept = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)
    longer = null(rows)
    assert Null.kept(kept).tolist() == [[[[True, False, False, False]]]] * 2
    torch.testing.assert_close(longer[:, 1:], rows)
    found = attention(torch.randn(2, 1, 4), longer, longer, Null.kept(kept))
    torch.testing.assert_close(found, attention.out(attention.value(null.row)).expand(2, 1, 4))


def test_distance_costs_each_head_its_own() -> None:
    near, difference = Nearness(2, heads=3), torch.randn(4, 5, 6, 2)
    with torch.no_grad():
        near.log_rate.copy_(torch.randn(3, 2))
    found = near(difference.square())
    assert found.shape == (4, 3, 5, 6)
    torch.testing.assert_close(found[1, 2, 3, 4], -(near.log_rate[2].exp() * difference[1, 3, 4] ** 2).sum())


def test_heads_see_far_and_near() -> None:
    lengths = (2 * Nearness(1, heads=4).log_rate.exp()).rsqrt()
    assert 3 < float(lengths[0].detach()) < 3.5 and 0.05 < float(lengths[3].detach()) < 0.07


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="expected a width that 4 heads divide, got 6"):
        Attention(6, heads=4)
