"""Streams that a task mixes after every layer, row by row: plain, in subspaces, and with skip connections."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conditioned import SIZES, D, H, N, T, check_by_rows, layout
from torch import Tensor, nn

from bayesmeta.models.conditioning import Stitch
from bayesmeta.models.conditioning.stitch import _layers


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh())


@pytest.mark.parametrize(("streams", "subspaces", "skip"), [(2, 1, False), (3, 2, True), (2, 4, False), (1, 1, True)])
def test_mixed_layer_by_layer(streams: int, subspaces: int, skip: bool) -> None:
    f = Stitch(streams, subspaces, skip).build(deep(), SIZES)

    def one(own: dict[str, Tensor], row: Tensor) -> Tensor:
        h, seen = row, []
        for i, same in enumerate(f.layers):
            each = [layer(h) for layer in same]
            part = [j * subspaces // H for j in range(H)]
            h = torch.stack(
                [sum(own[f"stitch_{i}"][s, part[j]] * each[s][j] for s in range(streams)) for j in range(H)]
            )
            seen.append(h)
        return f.head(sum(own["skip"][i] * seen[i] for i in range(2)) if skip else h)

    check_by_rows(f, one)


def test_blocks_lie_around_the_mean_of_streams_and_layers() -> None:
    f = Stitch(streams=4, subspaces=2, skip=True).build(deep(), SIZES)
    assert layout(f) == [("stitch_0", (4, 2), 0.25), ("stitch_1", (4, 2), 0.25), ("skip", (2,), 0.5)]
    assert layout(Stitch(streams=4).build(nn.Linear(D, H), SIZES)) == [("stitch_0", (4, 1), 0.25)]


def test_identity_leaves_streams_alone() -> None:
    """Weight 1 on a stream of its own for each task: task i has network i."""
    f = Stitch(streams=T).build(deep(), SIZES)
    own = torch.eye(T).repeat(1, 2).unsqueeze(1)
    x = torch.randn(T, N, D)
    nets = [nn.Sequential(*[same[i] for same in f.layers]) for i in range(T)]
    torch.testing.assert_close(f(own, x), torch.stack([f.head(net(x[i])) for i, net in enumerate(nets)]))


def test_streams_are_copies_of_the_trunk_with_weights_of_their_own() -> None:
    shared = deep()
    f = Stitch(streams=2).build(shared, SIZES)
    assert [f.layers[i][0][0] for i in range(2)] == [shared[0], shared[2]]
    assert not torch.isclose(f.layers[1][1][0].weight, shared[2].weight).any()


def test_layers_are_weights_with_what_follows() -> None:
    kinds = [nn.Flatten(2), nn.Linear(D, H), nn.LayerNorm(H), nn.Tanh(), nn.Dropout(), nn.Linear(H, H)]
    groups = [[*group] for group in _layers(nn.Sequential(*kinds))]
    assert groups == [kinds[:2], kinds[2:5], kinds[5:]]
    whole = nn.ModuleList([nn.Linear(D, H)])
    assert [[*group] for group in _layers(whole)] == [[whole]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 0}, "Stitch: expected streams as a whole number ≥ 1, got 0"),
        ({"subspaces": "2"}, "Stitch: expected subspaces as a whole number ≥ 1, got '2'"),
    ],
)
def test_options_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stitch(**options)


def test_a_trunk_without_weights_has_no_streams() -> None:
    with pytest.raises(ValueError, match="cross_stitch: expected a trunk with weights, got one without"):
        Stitch().build(nn.Identity(), SIZES)
