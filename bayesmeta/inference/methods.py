"""What every method of inference offers to the front door: the same two verbs, whatever happens inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.training import History


@dataclass(frozen=True)
class Inferred:
    """What a method has learned: guides for tasks, draws of θ, and what it went through."""

    guides: Guides
    shared: SharedDraws
    history: History


class Method(Protocol):
    """A method of inference, which owns its options."""

    def build(self, density: TaskDensity, tasks: Tasks) -> Guides:
        """The guides before anything is learned, for a stored state to be put into."""

    def learn(self, density: TaskDensity, tasks: Tasks, *, progress: bool, checkpoint: Any) -> Inferred:
        """Learns from tasks; random numbers come from torch's generator."""
