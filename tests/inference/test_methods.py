"""Every method offers the front door the same two verbs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from conjugate import ROWS, density, make_tasks

from bayesmeta.fitting import METHODS
from bayesmeta.inference.methods import Method
from bayesmeta.inference.nuts import laplace_guides


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_methods_have_the_verbs_of_the_protocol(kind: type[Any]) -> None:
    for verb in ("build", "learn"):
        wanted, given = (inspect.signature(getattr(owner, verb)).parameters for owner in (Method, kind))
        assert list(wanted) == list(given)
        assert [p.kind for p in wanted.values()] == [p.kind for p in given.values()]


@pytest.mark.parametrize("name", ["marginal", "nuts"])
def test_guides_are_built_in_the_shape_that_a_stored_state_has(name: str) -> None:
    tasks = make_tasks(ROWS)
    built = METHODS[name]().build(density(), tasks)
    learned = laplace_guides(density(), tasks, torch.randn(50, 1, dtype=torch.float64))
    ours, theirs = built.task.state_dict(), learned.task.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
