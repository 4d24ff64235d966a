"""Fixtures for every test: fixed seeds, no leaks from test to test, and the exact posteriors of `tests/data/exact`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pytest
import torch

from bayesmeta.hierarchy import derivatives

EXACT = pathlib.Path(__file__).parent / "data" / "exact"


@pytest.fixture(autouse=True)
def isolation() -> Iterator[None]:
    """Same seed and an empty parameter store before each test; the default dtype must be as it was after it."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left is torch.float32, f"the test left {left} behind as the default dtype"


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded graphs run as they are: the same numbers without the compiler's seconds."""
    monkeypatch.setattr(derivatives, "compile_graph", lambda graph, leaves: graph)


@pytest.fixture(scope="session")
def exact() -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """`exact(posterior)` returns the data and the exact moments of a posterior of `tests/data/exact`."""

    def read(posterior: str) -> tuple[dict[str, Any], dict[str, Any]]:
        data, moments = (
            json.loads((EXACT / posterior / name).read_text()) for name in ("data.json", "exact_moments.json")
        )
        return data, moments

    return read
