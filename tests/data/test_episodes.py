from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesmeta.data.episodes import Episode, Source, TaskSource, draw_episode, draw_tasks, full_batch, split_rows
from bayesmeta.data.tasks import Tasks


def make(sizes: tuple[int, ...]) -> Tasks:
    rows = iter(range(sum(sizes)))
    return Tasks.from_arrays(None, [[float(next(rows)) for _ in range(size)] for size in sizes])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_split_rows_is_a_partition() -> None:
    tasks = make((5, 0, 1, 3))
    context, target = split_rows(tasks, 2, seeded())
    assert context.names == target.names == tasks.names
    assert context.sizes.tolist() == [2, 0, 1, 2] and target.sizes.tolist() == [3, 0, 0, 1]
    for whole, left, right in zip(tasks, context, target, strict=True):
        assert sorted(left.y.tolist() + right.y.tolist()) == whole.y.tolist()
        assert left.y.tolist() == sorted(left.y.tolist())


def test_tasks_are_drawn_uniformly() -> None:
    tasks, generator = make((1,) * 10), seeded()
    counts = torch.bincount(torch.cat([draw_tasks(tasks, 4, generator) for _ in range(2000)]), minlength=10)
    z = (counts - 800) / np.sqrt(2000 * 0.4 * 0.6)
    assert z.abs().max() < 4
    assert draw_tasks(tasks, 99, generator).sort().values.tolist() == list(range(10))


def test_episode_sizes_are_uniform_and_leave_a_target() -> None:
    tasks, generator, seen = make((20, 2, 0)), seeded(), []
    for _ in range(400):
        episode = draw_episode(tasks, [0, 1, 2], context=(0, 4), generator=generator)
        assert isinstance(episode, Episode) and episode.context.names == episode.target.names
        assert (episode.context.n + episode.target.n).tolist() == [20, 2, 0]
        assert episode.target.n[1] >= 1
        seen.append(int(episode.context.n[0]))
    counts = np.bincount(seen, minlength=5)
    assert len(counts) == 5 and np.abs((counts - 80) / np.sqrt(400 * 0.2 * 0.8)).max() < 4


def test_one_size_for_all_is_uniform_too_and_needs_no_padding() -> None:
    tasks, generator, seen = make((6, 6, 6)), seeded(), []
    for _ in range(400):
        episode = draw_episode(tasks, [0, 1, 2], context=(0, 4), generator=generator, one_size=True)
        assert len(set(episode.context.n.tolist())) == 1 and episode.target.mask.all()
        seen.append(int(episode.context.n[0]))
    counts = torch.bincount(torch.tensor(seen), minlength=5)
    assert ((counts - 80).abs() < 4 * (400 * 0.2 * 0.8) ** 0.5).all()


def test_rows_pad_both_sides() -> None:
    episode = draw_episode(make((6, 6)), [1, 0], context=(2, 2), generator=seeded(), rows=8)
    assert episode.context.mask.shape == episode.target.mask.shape == (2, 8)
    assert episode.context.names == ("1", "0") and episode.context.n.tolist() == [2, 2]


@pytest.mark.parametrize("context", [(-1, 2), (3, 2)])
def test_wrong_sizes(context: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="context: expected sizes .* with 0 <= lo <= hi"):
        draw_episode(make((3,)), 0, context=context, generator=seeded())


def test_tasks_are_a_source_of_those_with_rows() -> None:
    source = TaskSource(make((5, 0, 4, 3)))
    assert isinstance(source, Source) and not isinstance(source.tasks, Source)
    episode = source.draw(2, context=(1, 2), generator=seeded())
    assert set(source.draw(99, context=(1, 2), generator=seeded()).target.names) == {"0", "2", "3"}
    assert len(episode.target.names) == 2 and set(episode.context.n.tolist()) <= {1, 2}
    assert episode.context.schema == source.schema
    with pytest.raises(ValueError, match="no task has rows"):
        TaskSource(make((0, 0)))


def test_tasks_are_held_out_where_there_are_enough() -> None:
    source = TaskSource(make((2,) * 20))
    known, held_out = source.hold_out(0.1, fewest=20, seed=0)
    assert held_out is not None and (len(known.tasks), len(held_out.tasks)) == (18, 2)
    assert set(known.tasks.names) | set(held_out.tasks.names) == set(source.tasks.names)
    assert source.hold_out(0.1, fewest=21, seed=0) == (source, None)


def test_full_batches_are_those_of_tasks() -> None:
    x, y = torch.randn(3, 4, 2, dtype=torch.float64), torch.arange(12).reshape(3, 4)
    expected = Tasks.from_arrays(list(x), list(y)).batch(slice(None))
    found = full_batch(x, y, expected.schema)
    assert found.names == expected.names and found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], value)
