from __future__ import annotations

import torch

from bayesmeta.data.families.rows import Rows
from bayesmeta.data.tasks import Tasks


def rows_of(*labels: list[float], missing: tuple[int, int] | None = None) -> Rows:
    batch = Tasks.from_arrays([[[10 * value] for value in y] for y in labels], labels).batch(range(len(labels)))
    if missing is not None:
        batch.observed[missing] = False
    return Rows.of(batch)


def listed(rows: Rows) -> list[list[float]]:
    kept = [y[mask].tolist() for y, mask in zip(rows.y, rows.mask, strict=True)]
    assert [[value / 10 for value in x[mask, 0].tolist()] for x, mask in zip(rows.x, rows.mask, strict=True)] == kept
    return kept


def test_real_rows_come_first_and_missing_labels_are_left_out() -> None:
    rows = rows_of([1.0, 2.0, 3.0], [4.0], missing=(0, 1))
    assert listed(rows) == [[1.0, 3.0], [4.0]]
    assert rows.mask.tolist() == [[True, True], [True, False]] and rows.y[1, 1] == 0 and rows.n.tolist() == [2, 1]


def test_rows_are_joined_and_selected_without_padding() -> None:
    rows = rows_of([1.0], [2.0, 3.0, 4.0], [5.0, 6.0]).joined(rows_of([7.0, 8.0], [9.0], [10.0]))
    assert listed(rows) == [[1.0, 7.0, 8.0], [2.0, 3.0, 4.0, 9.0], [5.0, 6.0, 10.0]]
    assert rows.mask.shape == (3, 4)
    some = rows[torch.tensor([2, 0])]
    assert some.mask.shape == (2, 3) and listed(some) == [[5.0, 6.0, 10.0], [1.0, 7.0, 8.0]]


def test_chunks_hold_every_task_once_by_size() -> None:
    rows = rows_of([1.0], [2.0, 3.0, 4.0], [5.0, 6.0])
    assert [chunk.tolist() for chunk in rows.chunks(5, 12)] == [[0, 2], [1]]
    assert [chunk.tolist() for chunk in rows.chunks(50, 12)] == [[0], [2], [1]]
