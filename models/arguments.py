"""Checks of arguments that several models take."""

from __future__ import annotations

from typing import Any

import bayesmeta as bm


def check_tasks(owner: str, tasks: Any) -> None:
    """Refuses what is no `Tasks`.

    Raises:
        ValueError: With what was given and the cure.
    """
    if not isinstance(tasks, bm.Tasks):
        raise ValueError(
            f"{owner}: expected training tasks as bm.Tasks, which give shapes and units, got {type(tasks).__name__}; "
            "make them by bm.Tasks.from_arrays or from_dataframe"
        )
