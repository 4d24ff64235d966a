"""What a fit keeps of the tasks it has learned from: by it known tasks are told from changed and from new ones.

A fit stored without its data keeps identities, fingerprints and sizes; shells, tasks of those sizes that repeat one
example row, then stand in for the data where a model is read again. `fitting.py` and `fit_storage.py` call it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.schema import TASK_COLUMN, Schema, dtype_of
from bayesmeta.data.tasks import Tasks

PER_TASK = (TASK_COLUMN, "task_weight")
"""How the keys of tensors with one entry a task begin."""


@dataclass(frozen=True)
class Sorted:
    """Positions of known tasks, of training tasks with other data, and of new tasks."""

    known: np.ndarray
    changed: np.ndarray
    new: np.ndarray


class TrainingTasks:
    """The training tasks, or what is left of them.

    Attributes:
        table: The tasks; shells if `complete` is False.
        complete: Whether the data are there.
    """

    def __init__(self, table: Tasks, fingerprints: Sequence[str] | None = None) -> None:
        """Wraps tasks.

        Args:
            table: The tasks, or shells of them.
            fingerprints: Those of the data that the shells stand in for; None for the data themselves.
        """
        self.table, self.complete = table, fingerprints is None
        self._fingerprints = tuple(table.fingerprints() if fingerprints is None else fingerprints)

    @property
    def schema(self) -> Schema:
        """Names, shapes and levels of the data."""
        return self.table.schema

    @property
    def data(self) -> Tasks:
        """The tasks with their data.

        Raises:
            ValueError: The fit was stored without them.
        """
        if not self.complete:
            raise ValueError(
                "the fit was saved with data=False and has no training data; pass the tasks yourself (they are still "
                "recognised), or load a file that was saved with data=True"
            )
        return self.table

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {identity: position for position, identity in enumerate(self.table.identities())}

    def sort(self, tasks: Tasks, *, updated: str) -> Sorted:
        """Tells known from changed and from new tasks.

        Args:
            tasks: Any tasks, encoded as the training tasks are.
            updated: "error" or "replace": what to do with a training task that has other data now.

        Raises:
            ValueError: A training task has other data and `updated` is "error", or its old data are not there.
        """
        found: dict[str, list[int]] = {"known": [], "changed": [], "new": []}
        for here, (identity, data) in enumerate(zip(tasks.identities(), tasks.fingerprints(), strict=True)):
            there = self._positions.get(identity)
            kind = "new" if there is None else "known" if self._fingerprints[there] == data else "changed"
            found[kind].append(here)
        self._check_changed([tasks.names[here] for here in found["changed"]], updated)
        return Sorted(**{kind: np.array(positions, dtype=int) for kind, positions in found.items()})

    def _check_changed(self, names: list[str], updated: str) -> None:
        shown = f"{names[:5]}{' and others' if len(names) > 5 else ''}"
        if names and updated == "error":
            raise ValueError(
                f"task(s) {shown} were in the fit with other data; pass the same data, rename them if they are other "
                "tasks, or say updated='replace' to infer them from these data instead"
            )
        if names and not self.complete:
            raise ValueError(
                f"updated='replace': the evidence of the old data of task(s) {shown} must be taken out of the shared "
                "parameters, but the fit was saved with data=False; load a file that was saved with data=True"
            )

    def before(self, changed: Tasks) -> Tasks:
        """The training tasks that `changed` ones replace, in their order."""
        return self.data[self.positions(changed)]

    def positions(self, known: Tasks) -> np.ndarray:
        """Where known tasks stand among the training tasks."""
        return np.array([self._positions[identity] for identity in known.identities()], dtype=int)

    def digest(self) -> str:
        """One fingerprint of all training tasks, their identities and their order."""
        whole = "\n".join([*self.table.identities(), *self._fingerprints])
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    def state(self, *, data: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able data from which `from_state` makes the same; without `data`, only what recognises it.

        Raises:
            ValueError: `data` is asked for and not there.
        """
        tensors, plain = (self.data if data else self.table).state()
        if data:
            return tensors, plain | {"complete": True}
        kept = {key: tensor for key, tensor in tensors.items() if key in ("offsets", "index")}
        return kept, plain | {"complete": False, "fingerprints": list(self._fingerprints)}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> TrainingTasks:
        """Reads what `state` returned.

        Raises:
            ValueError: A part is missing.
        """
        if plain.get("complete"):
            return cls(Tasks.from_state(tensors, plain))
        absent = sorted({"schema", "fingerprints", "names"} - set(plain)) + sorted({"offsets", "index"} - set(tensors))
        if absent:
            raise ValueError(f"stored tasks: {absent} missing; the file is damaged")
        return cls(_shells(Schema.from_json(plain["schema"]), tensors, plain), plain["fingerprints"])


def probe(schema: Schema) -> Tasks:
    """One task with one row, the schema's example: what models are compared at."""
    tensors = {"offsets": torch.tensor([0, 1]), "index": torch.tensor([0])}
    return _shells(schema, tensors, {"names": ["probe"], "origin": None})


def _shells(schema: Schema, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Tasks:
    """Tasks with given offsets and index that repeat the schema's example row."""
    rows, tasks = int(tensors["offsets"][-1]), len(tensors["index"])
    filled = {"offsets": tensors["offsets"], "index": tensors["index"]}
    for key, entry in schema.example.items():
        value = torch.tensor(entry, dtype=dtype_of(schema.dtypes[key]))
        in_task = key.startswith(PER_TASK)
        name = f"tasks/{key}" if in_task else f"rows/{key}"
        filled[name] = value.expand(tasks if in_task else rows, *value.shape)
    return Tasks.from_state(filled, dict(plain) | {"schema": schema.to_json()})
