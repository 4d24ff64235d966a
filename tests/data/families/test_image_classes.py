"""Episodes from labelled images: which images, under which numbers, in which order, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.data.episodes import Episode, Source
from bayesmeta.data.families.image_classes import ImageClasses

CLASSES, EACH = 8, 6


def numbered(**options: Any) -> ImageClasses:
    """Image i is 2 x 2 times the number i; class i // EACH."""
    images = np.arange(CLASSES * EACH, dtype=float)[:, None, None] * np.ones((1, 2, 2))
    return ImageClasses(images, np.arange(CLASSES * EACH) // EACH, **{"way": 3, "shot": 2, "query": 3} | options)


def drawn(source: ImageClasses, count: int = 200, seed: int = 0) -> Episode:
    return source.draw(count, context=(0, 10), generator=torch.Generator().manual_seed(seed))


def test_a_task_shows_each_class_shot_times_and_asks_for_others_of_it() -> None:
    episode = drawn(numbered())
    assert isinstance(numbered(), Source)
    for old, asked in zip(
        zip(episode.context.x, episode.context.y, strict=True),
        zip(episode.target.x, episode.target.y, strict=True),
        strict=True,
    ):
        shown = {int(i): int(label) for i, label in zip(old[0][:, 0, 0], old[1], strict=True)}
        scored = {int(i): int(label) for i, label in zip(asked[0][:, 0, 0], asked[1], strict=True)}
        assert len(shown) == 6 and len(scored) == 9 and not set(shown) & set(scored)
        assert np.bincount(list(shown.values())).tolist() == [2, 2, 2]
        assert np.bincount(list(scored.values())).tolist() == [3, 3, 3]
        classes = {(i // EACH, label) for i, label in (shown | scored).items()}
        assert len(classes) == 3 and len({c for c, _ in classes}) == 3


def test_classes_are_drawn_uniformly_and_renumbered_at_random() -> None:
    episode = drawn(numbered(), 3000)
    classes = (episode.context.x[..., 0, 0] // EACH).long()
    first = classes.gather(1, (episode.context.y == 0).long().argmax(1, keepdim=True)).squeeze(1)
    counts = torch.bincount(first, minlength=CLASSES).double()
    assert float(((counts - 375) / (3000 / 8 * 7 / 8) ** 0.5).abs().max()) < 4


def test_rows_are_in_random_order() -> None:
    first = torch.bincount(drawn(numbered(), 3000).target.y[:, 0], minlength=3).double()
    assert float(((first - 1000) / (3000 * 2 / 9) ** 0.5).abs().max()) < 4


def test_classes_may_differ_in_size() -> None:
    images = np.arange(37.0)[:, None, None] * np.ones((1, 2, 2))
    source = ImageClasses(images, ["a"] * 2 + ["b"] * 30 + ["c"] * 5, way=3, shot=1, query=1)
    episode = drawn(source, 50)
    number = torch.stack([batch.x[..., 0, 0].sort(1).values for batch in (episode.context, episode.target)])
    for column, (first, last) in enumerate([(0, 1), (2, 31), (32, 36)]):
        assert bool(((number[..., column] >= first) & (number[..., column] <= last)).all())
    assert bool((number[0] != number[1]).all()), "no image is shown and asked for"
    assert source.names == ("a", "b", "c")


def test_turned_images_are_further_classes() -> None:
    corner = np.zeros((40, 3, 3), dtype=np.uint8)
    corner[:, 0, 0] = 255
    source = ImageClasses(corner, np.repeat([0, 1], 20), way=8, shot=1, query=2, rotations=True)
    assert len(source) == 8
    episode = drawn(source, 20)
    corners = episode.target.x[..., [0, 0, 2, 2], [0, 2, 0, 2]].argmax(-1)
    for task, labels in zip(corners, episode.target.y, strict=True):
        assert torch.bincount(task).tolist() == [4, 4, 4, 4]
        assert all(len(task[labels == label].unique()) == 1 for label in range(8))


def test_bytes_become_numbers_from_0_to_1_and_floats_stay() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4)).astype(np.uint8)
    labels = np.repeat([0, 1], 10)
    pair = [drawn(ImageClasses(values, labels, way=2, query=2), 3) for values in (images, images / np.float64(255))]
    assert pair[0].target.x.dtype == pair[1].target.x.dtype == torch.float32
    torch.testing.assert_close(pair[0].target.x, pair[1].target.x)
    assert 0.9 < float(pair[0].target.x.max()) <= 1.0


def test_tasks_to_evaluate_on() -> None:
    source = numbered()
    context, target = source.simulate(4, seed=3)
    again, other = source.simulate(4, seed=3)[1], source.simulate(4, seed=4)[1]
    assert context.names == target.names and len(set(context.names) | set(other.names)) == 8
    assert torch.equal(target.x, again.x) and not torch.equal(target.x, other.x)
    assert context.sizes.tolist() == [6] * 4 and target.sizes.tolist() == [9] * 4
    assert context.schema == target.schema == source.schema
    assert context.batch([0]).tensors.keys() == drawn(source, 1).context.tensors.keys()
    for key, value in context.batch([0]).tensors.items():
        assert value.dtype == drawn(source, 1).context.tensors[key].dtype, key


def seen(source: ImageClasses) -> set[int]:
    return set((drawn(source).target.x[..., 0, 0] // EACH).long().flatten().tolist())


def test_classes_are_split() -> None:
    known, new = numbered(rotations=True).split(new=0.375, seed=0)
    assert (len(known), len(new)) == (20, 12)
    assert not seen(known) & seen(new) and seen(known) | seen(new) == set(range(CLASSES))
    with pytest.raises(ValueError, match="new: expected a number of classes from 1 to 7 or a fraction, got 8"):
        numbered().split(new=8, seed=0)
    with pytest.raises(ValueError, match="at least way = 3 classes, got 2: '"):
        numbered().split(new=2, seed=0)


def test_held_out_classes_are_enough_for_a_task() -> None:
    known, held_out = numbered().hold_out(0.1, fewest=8, seed=0)
    assert held_out is not None and (len(known), len(held_out)) == (5, 3)
    assert not seen(known) & seen(held_out)
    assert numbered().hold_out(0.1, fewest=9, seed=0)[1] is None
    assert numbered(way=5).hold_out(0.1, fewest=2, seed=0)[1] is None
    turned = numbered(rotations=True, way=5).hold_out(0.1, fewest=2, seed=0)[1]
    assert turned is not None and len(turned) == 8


IMAGES, LABELS = np.zeros((12, 2, 3)), np.repeat([0, 1, 2], 4)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (IMAGES, LABELS, {"way": 4, "query": 3}, "at least way = 4 classes, got 3: '0', '1', '2'; lower way"),
        (IMAGES, LABELS, {"way": 3}, r"at least shot \+ query = 16 images of each class, got '0 \(4\)'"),
        (IMAGES, LABELS[:-1], {}, r"one label an image, 12 in all, got labels of shape \(11,\)"),
        (IMAGES, LABELS, {"rotations": True}, r"square images to turn, got shape \(2, 3\)"),
        (IMAGES, LABELS, {"way": 1}, "way must be a whole number of at least 2, got 1"),
        (IMAGES, LABELS, {"shot": 0}, "shot must be a whole number of at least 1, got 0"),
        (IMAGES, LABELS, {"query": 1.5}, "query must be a whole number of at least 1, got 1.5"),
        (IMAGES.astype(int), LABELS, {}, "of uint8 or floats, got shape .* of torch.int64"),
        (np.where(np.arange(12)[:, None, None] == 5, np.nan, IMAGES), LABELS, {}, "got NaN or inf in image 5"),
    ],
)
def test_errors(images: np.ndarray, labels: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClasses(images, labels, **options)


def test_the_facade_has_it() -> None:
    assert bm.families.ImageClasses is ImageClasses
