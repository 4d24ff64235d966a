"""Checks of what users pass to `fit`, `Fit` and `simulate`: one clear message each. `fitting.py` calls them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch

from bayesmeta.data.episodes import Source
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.model import ConditionalModel

DTYPES = (torch.float64, torch.float32)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses anything but one of some names.

    Raises:
        ValueError: With what was expected, what came and the cure.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def numbers(shared: Any) -> dict[str, np.ndarray]:
    """Given values of shared sites as arrays.

    Raises:
        ValueError: No mapping, or a value that is not made of numbers.
    """
    if not isinstance(shared, Mapping):
        raise ValueError(f"shared: expected {{site: value}}, got {type(shared).__name__}")
    found = {}
    for name, value in shared.items():
        try:
            found[name] = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"shared: {name!r} must be numbers in the shape of the site, got {value!r}") from error
    return found


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuses anything but a whole number of at least `least`.

    Raises:
        ValueError: With what was expected, what came and the cure.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_tasks(name: str, tasks: Any) -> None:
    """Refuses anything but `Tasks`.

    Raises:
        ValueError: With what was expected, what came and the cure.
    """
    if not isinstance(tasks, Tasks):
        raise ValueError(
            f"{name}: expected Tasks, got {type(tasks).__name__}; make them with bm.Tasks.from_dataframe or "
            "bm.Tasks.from_arrays"
        )


def check_model(model: Any) -> None:
    """Refuses what cannot be called.

    Raises:
        ValueError: With what was expected, what came and the cure.
    """
    if not callable(model):
        raise ValueError(f"model: expected a Pyro function of a batch or a HierarchicalModel, got {model!r}")


def check_arguments(model: Any, tasks: Any, seed: Any, device: str, dtype: torch.dtype) -> None:
    """Refuses arguments of `fit` before any work is done.

    Raises:
        ValueError: With what was expected, what came and the cure.
    """
    check_model(model)
    _check_training(model, tasks)
    check_whole("seed", seed, 0)
    if device != "cpu":
        raise ValueError(f"device must be 'cpu', got {device!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype!r}")


def _check_training(model: Any, tasks: Any) -> None:
    if isinstance(tasks, Source):
        if isinstance(model, ConditionalModel):
            return
        raise ValueError(
            f"fit: a model with task parameters keeps the tasks that it learned from; expected Tasks, got the endless "
            f"source {type(tasks).__name__}; draw some from it, or fit a ConditionalModel"
        )
    check_tasks("fit", tasks)
    if len(tasks) < 2:
        raise ValueError(
            f"fit needs at least two tasks to learn what they share, got {len(tasks)}; with one task, fix the shared "
            "parameters in the model and use fit on simulated tasks, or use Pyro itself"
        )
