"""What a fit and a checkpoint of its training consist of, as named tensors and plain data.

`Fit.save`, `bayesmeta.load` and `fit(checkpoint=)` call it; the file format itself is in `storage.py`. A stored
state is only put into the model that it belongs to (`model_identity.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.data.schema import dtype_of
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.hierarchy.tracing import Model
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.mixing import Mixing
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.training import History
from bayesmeta.results import storage
from bayesmeta.results.fit_options import check_same, describe, restored
from bayesmeta.results.model_identity import (
    buffers,
    check_densities,
    check_model,
    dtype_name,
    identity,
    plain,
    with_tried,
)
from bayesmeta.results.training_tasks import TrainingTasks

PathLike = str | os.PathLike[str]
Tensors = dict[str, Tensor]
SHARED_META = ("khat", "ess", "status", "chains")
"""What is stored of the draws of θ besides tensors."""


@dataclass
class FitState:
    """All that a fit is made of."""

    density: TaskDensity
    guides: Guides
    shared: SharedDraws
    training: TrainingTasks
    history: History
    options: Any
    seed: int


def save_fit(path: PathLike, state: FitState, *, data: bool) -> None:
    """Writes a fit to one file.

    Args:
        path: The file; its folder must exist.
        state: The fit.
        data: Whether the training tasks are stored, or only what recognises them.

    Raises:
        ValueError: The folder does not exist, or the data are asked for and not there.
    """
    stored, training = state.training.state(data=data)
    tensors = _learned_tensors(state.density, state.guides) | {f"training/{k}": t for k, t in stored.items()}
    tensors |= _shared_tensors(state.shared)
    shared = {name: getattr(state.shared, name) for name in SHARED_META}
    meta = identity(state.density, state.guides.values)
    meta |= {
        "kind": "fit",
        "options": describe(state.options),
        "seed": state.seed,
        "training": training,
        "history": _history(state.history),
        "theta": plain(shared),
    }
    storage.save(path, tensors=tensors, meta=meta)


def load_fit(path: PathLike, model: Model, *, kinds: Mapping[str, type[Any]], options: Any | None = None) -> FitState:
    """Reads a fit.

    Args:
        path: The file.
        model: The model that was fitted.
        kinds: Classes of options by method.
        options: The fit's options, where they hold objects that cannot be stored.

    Raises:
        ValueError: The file cannot be read, or belongs to another model or other options.
    """
    tensors, meta = _read(path, "fit")
    options = restored(str(path), meta["options"], kinds, options)
    training = TrainingTasks.from_state(_under("training/", tensors), meta["training"])
    with seeded(0):
        density = TaskDensity(model, training.table, dtype=dtype_of(meta["dtype"]))
        check_model(str(path), meta, density)
        guides = options.build(density, training.table)
    _put_back(path, tensors, density, guides)
    guides.values = {name: value.detach() for name, value in guides.values.items()}
    density.learned.values.update(guides.values)
    density.structure = with_tried(density, meta["tried"])
    check_densities(str(path), meta, density, guides.values)
    stats = {name: value.numpy() for name, value in _under("stats/", tensors).items()}
    weight = tensors["log_weight"].numpy()
    judged = {name: value.numpy() for name, value in _under("mixing/", tensors).items()}
    shared = SharedDraws(tensors["theta"], weight, **meta["theta"], stats=stats, noise=tensors.get("noise"))
    shared.mixing = Mixing(**judged) if judged else None
    return FitState(density, guides, shared, training, History(**meta["history"]), options, meta["seed"])


def _shared_tensors(shared: SharedDraws) -> Tensors:
    tensors = {"theta": shared.theta, "log_weight": torch.as_tensor(shared.log_weight)}
    tensors |= {f"stats/{name}": torch.as_tensor(values) for name, values in shared.stats.items()}
    judged = shared.mixing._asdict() if shared.mixing is not None else {}
    tensors |= {f"mixing/{name}": torch.as_tensor(values) for name, values in judged.items()}
    return tensors if shared.noise is None else tensors | {"noise": shared.noise}


class FileCheckpoint:
    """The state between the stages of training in a file.

    Args:
        path: The file, written after every stage; its folder must exist.
        density: The model.
        training: The training tasks.
        options: Of the fit.
        seed: Of the fit.

    Raises:
        ValueError: The folder does not exist.
    """

    def __init__(self, path: PathLike, density: TaskDensity, training: TrainingTasks, options: Any, seed: int) -> None:
        if not Path(path).resolve().parent.is_dir():
            raise ValueError(f"checkpoint: the folder of {path} does not exist; create it first")
        self._path, self._density, self._training = path, density, training
        self._options, self._seed = options, seed

    def restore(self, guides: Guides) -> History:
        """Puts a stored state into the guides and the random generator; returns the stages that it has behind it.

        Raises:
            ValueError: The file cannot be read, or belongs to another model, other tasks, options or another seed.
        """
        if not Path(self._path).exists():
            return History()
        tensors, meta = _read(self._path, "checkpoint")
        where = f"the checkpoint {self._path}"
        check_same(where, meta["options"], describe(self._options))
        here = {"seed": self._seed, "dtype": dtype_name(self._density), "tasks": self._training.digest()}
        for name, value in here.items():
            if meta[name] != value:
                raise ValueError(
                    f"cannot use {where}: it belongs to a fit with other {name} ({meta[name]!r} in the file, {value!r} "
                    "here); give another path, or delete the file to start again"
                )
        check_model(str(self._path), meta, self._density)
        _put_back(self._path, tensors, self._density, guides)
        check_densities(str(self._path), meta, self._density, guides.values)
        torch.set_rng_state(tensors["generator"])
        return History(**meta["history"])

    def store(self, guides: Guides, history: History) -> None:
        """Writes the state after a stage; the file is the old one or the new one, never half of it."""
        meta = identity(self._density, guides.values)
        meta |= {
            "kind": "checkpoint",
            "options": describe(self._options),
            "seed": self._seed,
            "tasks": self._training.digest(),
            "history": _history(history),
        }
        tensors = _learned_tensors(self._density, guides) | {"generator": torch.get_rng_state()}
        storage.save(self._path, tensors=tensors, meta=meta)


def _read(path: PathLike, kind: str) -> tuple[Tensors, dict[str, Any]]:
    tensors, meta = storage.load(path)
    found = meta.get("kind") if isinstance(meta, dict) else None
    if found != kind:
        cure = "bm.load reads what fit.save wrote, fit(checkpoint=) what it wrote itself"
        raise ValueError(f"cannot load {path}: expected a {kind}, the file holds {found or 'something else'}; {cure}")
    return tensors, meta


def _learned_tensors(density: TaskDensity, guides: Guides) -> Tensors:
    """Everything that training has changed."""
    tensors: Tensors = {}
    for head, module in (("shared", guides.shared), ("task", guides.task)):
        tensors |= {f"{head}/{key}": value for key, value in module.state_dict().items()}
    tensors |= {f"values/{name}": value for name, value in guides.values.items()}
    return tensors | {f"buffers/{name}": value for name, value in buffers(density)}


def _put_back(path: PathLike, tensors: Tensors, density: TaskDensity, guides: Guides) -> None:
    """Puts stored tensors into guides and a model that have been built anew."""
    for head, module in (("shared", guides.shared), ("task", guides.task)):
        _fill(path, module, _under(f"{head}/", tensors))
    with torch.no_grad():
        for name, value in guides.values.items():
            value.copy_(tensors[f"values/{name}"])
        for name, buffer in buffers(density):
            buffer.copy_(tensors[f"buffers/{name}"])


def _fill(path: PathLike, module: nn.Module, state: Tensors) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"cannot load {path}: the guide {type(module).__name__} has other parameters than the one in the file; "
            f"give the same options. {error}"
        ) from error


def _under(head: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {key.removeprefix(head): value for key, value in tensors.items() if key.startswith(head)}


def _history(history: History) -> dict[str, Any]:
    return {"steps": plain(history.steps), "stages": plain(history.stages)}
