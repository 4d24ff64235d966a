"""The convolutional process: grids, masks in the U-Net, and predictions that move with the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neural_tasks import ragged
from torch import Tensor

import bayesmeta as bm
from bayesmeta.models.neural_processes import conv_cnp
from bayesmeta.models.neural_processes.conv_cnp import Cells, UNet
from bayesmeta.models.neural_processes.sets import Rows

CELLS = Cells(step=0.1, block=4, margin=0.3)


def rows(*x: float) -> Rows:
    values = torch.tensor([x]).reshape(1, -1, 1)
    return Rows(values, values, torch.ones(1, len(x), dtype=torch.bool))


def test_a_grid_spans_the_rows_and_a_margin_in_whole_blocks() -> None:
    grid, own = CELLS(rows(0.5, -0.2), torch.tensor([[[-1.0], [2.0]]]))
    assert grid.shape == own.shape and grid.shape[1] % 4 == 0 and own.all()
    torch.testing.assert_close(grid.diff(), torch.full_like(grid.diff(), 0.1))
    low, high = float(grid.min()), float(grid.max()) + CELLS.step
    assert -1.3 - 0.4 < low <= -1.3 + 1e-6 and 2.3 - 1e-6 <= high < 2.3 + 0.4
    assert abs((-0.2 - low) / 0.4 - round((-0.2 - low) / 0.4)) < 1e-4, "the lowest row lies between two blocks"


def test_the_grid_of_a_task_does_not_depend_on_others() -> None:
    long, short = rows(0.0, 3.0), rows(0.5, 0.0)
    both = Rows(
        *(torch.cat(pair) for pair in ((long.x, short.x), (long.labels, short.labels), (long.kept, short.kept)))
    )
    new = torch.tensor([[[0.2]]])
    grid, own = CELLS(both, new.expand(2, 1, 1))
    alone, _ = CELLS(short, new)
    assert own[0].all() and int(own[1].sum()) == alone.shape[1]
    torch.testing.assert_close(grid[1, own[1]], alone[0])


def test_what_is_not_a_tasks_own_is_as_if_it_were_not_there() -> None:
    net = UNet(2, 4, 3)
    h = torch.randn(1, 2, 32)
    own = (torch.arange(32) < 24).float().reshape(1, 1, 32)
    torch.testing.assert_close(net(h, own)[..., :24], net(h[..., :24], own[..., :24]))
    assert (net(h, own)[..., 24:] == 0).all()


def module(**options: Any) -> Any:
    return conv_cnp.build(ragged(), width=8, depth=3, points=8, **options).module


@pytest.mark.parametrize("shift", [7.0, -100.3])
def test_predictions_move_with_the_rows(shift: float) -> None:
    net, batch, x = module(), ragged().batch(slice(None)), torch.randn(4, 5, 1)
    moved = batch.replace(batch.tensors | {"x": batch.x + shift})
    torch.testing.assert_close(net(moved, x + shift).mean, net(batch, x).mean, rtol=1e-3, atol=2e-4)


def test_they_do_not_move_with_the_new_rows_alone() -> None:
    net, batch, x = module(), ragged((4,)).batch([0]), torch.randn(1, 5, 1)
    assert (net(batch, x + 0.5).mean - net(batch, x).mean).abs().max() > 1e-4


def test_other_new_rows_hardly_matter() -> None:
    net, batch = module(margin=4.0), ragged((4,)).batch([0])
    x = torch.tensor([[[0.1]]])
    more = torch.tensor([[[0.1], [-2.0], [2.0]]])
    torch.testing.assert_close(net(batch, more).mean[:, :1], net(batch, x).mean, rtol=0, atol=2e-3)


def test_the_signal_is_the_mean_of_near_labels() -> None:
    """Against a loop: density and signal at each point of the grid."""
    net, batch = module(), ragged((4,)).batch([0])
    read: list[Tensor] = []
    net.unet.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    x = torch.zeros(1, 1, 1)
    net(batch, x)
    known = net.reader(batch)
    grid, _ = net.cells(known, net.reader.inputs(x))
    for place in (0, grid.shape[1] // 2):
        weights = torch.exp(-0.5 * ((grid[0, place] - known.x[0, :, 0]) / net.log_length_in.exp()) ** 2)
        density, signal = weights.sum(), (weights * known.labels[0, :, 0]).sum() / (weights.sum() + 1e-8)
        torch.testing.assert_close(read[0][0, :, place], torch.stack([density, signal]))


def test_a_grid_that_is_too_long_is_refused() -> None:
    net, batch = module(), ragged().batch(slice(None))
    with pytest.raises(ValueError, match=r"at most 65536 points, got \d+ for task 2 of a batch; look for outlying x"):
        net(batch, torch.tensor([0.0, 0.0, 1e6, 0.0]).reshape(4, 1, 1).repeat(1, 2, 1) * torch.tensor([[[0.0], [1.0]]]))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected x to be one number, got shape \(2,\); take tnp"):
        conv_cnp.build(ragged(dx=2))
    with pytest.raises(ValueError, match=r"expected x to be one number, got shape \(0,\)"):
        conv_cnp.build(bm.Tasks.from_arrays(None, [[1.0, 2.0]]))
    with pytest.raises(ValueError, match="conv_cnp: expected margin ≥ 0, got -1"):
        conv_cnp.build(ragged(), margin=-1)
