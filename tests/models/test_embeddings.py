"""Embeddings of images, and what contexts say about classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.models.embeddings import CHUNK_ROWS, Conv4, RandomAffine, by_class, embedded


def images(count: int, size: int = 28) -> torch.Tensor:
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (16, 3), (29, 1)])
def test_conv4_has_the_features_that_it_says(size: int, channels: int) -> None:
    embed = Conv4(width=8, channels=channels, size=size).eval()
    assert embed(torch.rand(2, channels, size, size)).shape == (2, embed.features)
    if channels == 1:
        assert torch.equal(embed(images(2, size)), embed(images(2, size).unsqueeze(1)))


def test_an_image_is_embedded_alike_whatever_is_beside_it() -> None:
    embed = Conv4(width=8)
    embed(images(16))
    assert not torch.allclose(embed(images(16))[:3], embed(images(3)), atol=1e-3)
    embed.eval()
    torch.testing.assert_close(embed(images(16))[:3], embed(images(3)))


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(1, 28, 28\), got \(1, 20, 20\); give channels="):
        Conv4()(images(2, 20))


def test_images_are_moved_in_training_alone() -> None:
    dots = torch.zeros(500, 1, 29, 29)
    dots[:, 0, 14, 14] = 1.0
    augment = RandomAffine(turn=0.0, scale=0.0, shear=0.0, shift=4 / 14.5)
    assert augment.eval()(dots) is dots
    state = torch.get_rng_state()
    moved = augment.train()(dots)
    torch.set_rng_state(state)
    place = torch.arange(29.0)
    centre = torch.stack([(moved.sum(2) * place).sum(-1), (moved.sum(3) * place).sum(-1)]).squeeze(-1) - 14
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.ones(500))
    assert float(centre.abs().max()) < 4.001
    assert abs(float(centre.std()) - 4 / 3**0.5) < 4 * 4 / 3**0.5 / (2 * 1000) ** 0.5
    assert float(centre.mean(-1).abs().max()) < 4 * 4 / 3**0.5 / 500**0.5


@pytest.mark.parametrize(
    ("options", "radius", "angle"),
    [
        ({"turn": 20.0}, (6.0, 6.0), 20.0),
        ({"scale": 0.2}, (6 / 1.2, 6 / 0.8), 0.0),
        ({"shear": 0.2}, (6.0, 6 * math.hypot(1, 0.2)), math.degrees(math.atan(0.2))),
    ],
)
def test_each_change_is_as_large_as_said(options: dict[str, float], radius: tuple[float, float], angle: float) -> None:
    """Where a blob six pixels below the centre goes: the extremes of 1,000 are within 1 % of the range."""
    place = torch.arange(29.0) - 14
    blob = torch.exp(-0.5 * ((place - 6)[:, None] ** 2 + place**2) / 2.0).expand(1000, 1, 29, 29)
    state = torch.get_rng_state()
    moved = RandomAffine(**{"turn": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0} | options)(blob).squeeze(1)
    torch.set_rng_state(state)
    across, down = ((moved.sum(dim) * place).sum(-1) / moved.sum((1, 2)) for dim in (1, 2))
    far, turned = across.hypot(down), torch.atan2(across, down).rad2deg()
    assert (float(far.min()), float(far.max())) == pytest.approx(radius, abs=0.05)
    assert (float(turned.min()), float(turned.max())) == pytest.approx((-angle, angle), abs=0.01 + 0.02 * angle)


class Counting(nn.Module):
    """Leaves rows as they are, and keeps how many came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(rows))
        return rows


def test_rows_are_embedded_together_in_training_and_in_chunks_later() -> None:
    embed, old, new = Counting(), torch.randn(3, 4, 2), torch.randn(3, CHUNK_ROWS // 2, 2)
    for training in (True, False):
        pair = embedded(embed.train(training), old, new)
        assert torch.equal(pair[0], old) and torch.equal(pair[1], new)
    total = 12 + 3 * CHUNK_ROWS // 2
    assert embed.seen == [total, CHUNK_ROWS, total - CHUNK_ROWS]


def batch(y: list[Any], **options: Any) -> bm.Batch:
    return bm.Tasks.from_arrays([np.zeros((len(row), 2)) for row in y], y, **options).batch(slice(None))


def test_means_and_counts_leave_padding_and_missing_labels_out() -> None:
    context = batch([[0, 2, 2, np.nan], [1]], missing="mask")
    h = torch.arange(16.0).reshape(2, 4, 2)
    found = by_class(h, context, 3)
    assert found.counts.tolist() == [[1, 0, 2], [0, 1, 0]]
    assert found.means.tolist() == [[[0, 1], [0, 0], [3, 4]], [[0, 0], [8, 9], [0, 0]]]
    assert found.possible.all()
    assert by_class(h, context, None).possible.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("y", "classes", "message"),
    [
        ([[0, 1], [3]], 3, r"task '1': expected labels from 0 to 2, got 0 to 3; renumber them or give classes="),
        ([[0, -1]], None, r"task '0': expected labels from 0, got -1 to 0"),
        ([[0, 1], []], None, "task '1' has no context, so that its number of classes is unknown; give classes="),
        ([[0.5, 1.0]], 2, "expected classes as labels, one whole number a row, got torch.float64"),
    ],
)
def test_wrong_labels(y: list[Any], classes: int | None, message: str) -> None:
    context = batch(y)
    with pytest.raises(ValueError, match=message):
        by_class(torch.zeros(*context.mask.shape, 2), context, classes)
