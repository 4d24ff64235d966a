"""The conditional neural process against its formula, a row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neural_tasks import ragged

from bayesmeta.models.neural_processes import cnp


def test_it_is_the_decoded_mean_of_encoded_rows() -> None:
    tasks = ragged()
    module: Any = cnp.build(tasks, width=8, depth=2).module
    x = torch.tensor([[0.3], [-1.0]])
    labels = module(tasks.batch(slice(None)), x.expand(4, 2, 1))
    units = module.reader
    for place, task in enumerate(tasks):
        rows = torch.cat([(task.x - units.x_loc) / units.x_scale, (task.y[:, None] - units.y_loc) / units.y_scale], -1)
        r = (module.pool.null + module.encoder(rows.float()).sum(0)) / (1 + len(rows))
        numbers = module.decoder(torch.cat([r.expand(2, -1), (x - units.x_loc) / units.x_scale], -1))
        torch.testing.assert_close(labels.mean[place], units.y_loc + units.y_scale * numbers[:, 0])


def test_depth_is_the_number_of_hidden_layers() -> None:
    def linear(depth: int) -> int:
        module: Any = cnp.build(ragged(), width=8, depth=depth).module
        return sum(isinstance(part, torch.nn.Linear) for part in module.modules())

    assert linear(3) == linear(1) + 4


def test_sizes_of_contexts() -> None:
    assert cnp.build(ragged()).context == (0, 3)
    assert cnp.build(ragged(), context=(1, 2)).context == (1, 2)


def test_errors() -> None:
    with pytest.raises(ValueError, match="cnp: expected depth as a whole number ≥ 1, got 0"):
        cnp.build(ragged(), depth=0)
