"""Arguments of users: what passes, and what is refused with which words (more of them in `tests/test_errors.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bayesmeta.data.episodes import TaskSource
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.model import ConditionalModel
from bayesmeta.results.arguments import check_arguments, check_choice, check_model, check_tasks, check_whole, numbers

TASKS = Tasks.from_arrays(None, [np.zeros(2), np.ones(1)])


def test_what_is_right_passes() -> None:
    check_choice("refine", "auto", ("auto", "none"))
    check_model(print)
    check_tasks("like", TASKS)
    for value in (1, np.int64(3)):
        check_whole("draws", value, 1)
    check_arguments(print, TASKS, 0, "cpu", torch.float32)


@pytest.mark.parametrize("value", [0, 1.0, True, "1", None, np.float64(2)])
def test_anything_but_a_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="draws must be a whole number of at least 1, got "):
        check_whole("draws", value, 1)


def test_numbers_of_shared_sites() -> None:
    found = numbers({"mu": [1, 2.5], "tau": torch.tensor(3.0)})
    assert found["mu"].tolist() == [1.0, 2.5] and found["tau"].shape == ()
    for value in ([[1.0], [1.0, 2.0]], {}, "high"):
        with pytest.raises(ValueError, match="shared: 'mu' must be numbers in the shape of the site"):
            numbers({"mu": value})


def test_only_conditional_models_take_endless_sources() -> None:
    check_arguments(ConditionalModel(print), TaskSource(TASKS), 0, "cpu", torch.float32)
    with pytest.raises(ValueError, match="expected Tasks, got the endless source TaskSource; draw some from it"):
        check_arguments(print, TaskSource(TASKS), 0, "cpu", torch.float32)
