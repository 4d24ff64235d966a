"""Which model a stored state belongs to: its sites, its densities at one point, and its frozen parameters.

`fit_storage.py` stores the identity beside the state, and refuses to put the state into another model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.latents import Structure
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.results.training_tasks import probe

SITES = ("shared", "task", "observed")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative difference of log densities between two machines."""


def identity(density: TaskDensity, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a stored state must have in common with the model that it is put into.

    Args:
        density: The model.
        values: Its point estimates in the stored state.
    """
    tried = {
        entry.name: getattr(density.structure, entry.name)
        for entry in dataclasses.fields(density.structure)
        if entry.name not in SITES
    }
    return {
        "sites": _sites(density),
        "tried": plain(tried),
        "densities": _densities(density, values),
        "frozen": [_fingerprint(parameter) for parameter in density.frozen.values()],
        "dtype": dtype_name(density),
    }


def dtype_name(density: TaskDensity) -> str:
    """The model's floating dtype as text."""
    return str(density.dtype).removeprefix("torch.")


def _sites(density: TaskDensity) -> dict[str, list[Any]]:
    """Names and shapes of all sites, parameters and buffers, in the model's order."""
    structure, learned = density.structure, density.learned
    return {
        "shared site": [[site.name, list(site.shape)] for site in structure.shared],
        "task site": [[site.name, list(site.shape)] for site in structure.task],
        "observed site": [[site.name, []] for site in structure.observed],
        "parameter": [[name, list(value.shape)] for name, value in learned.values.items()],
        "buffer": [[name, list(value.shape)] for name, value in buffers(density)],
    }


def buffers(density: TaskDensity) -> Iterator[tuple[str, Tensor]]:
    """The fit's copies of the buffers of registered modules."""
    for name, module in density.learned.modules.items():
        for key, buffer in module.named_buffers():
            yield f"{name}.{key}", density.learned.buffers[id(buffer)]


def _densities(density: TaskDensity, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Log densities of every site at one point and one row: they tell apart models that have the same sites."""
    batch = probe(density.schema).batch([0])
    theta = density.initial_theta() + 0.1
    noise = torch.full((1, density.structure.task_size), 0.1, dtype=density.dtype)
    before = dict(density.learned.values)
    density.learned.values.update({name: value.detach() for name, value in values.items()})
    try:
        with seeded(0), torch.no_grad():
            terms = density.terms(batch, theta, noise)
            prior = density.log_prior(theta)
    finally:
        density.learned.values.update(before)
    return {"the shared sites": float(prior)} | {f"site {name!r}": float(term.sum()) for name, term in terms.items()}


def _fingerprint(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{values.dtype}{tuple(values.shape)}".encode(), digest_size=16)
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_model(where: str, meta: Mapping[str, Any], density: TaskDensity) -> None:
    """Refuses a model with other sites or other frozen parameters."""
    here = _sites(density)
    differences = [text for kind, saved in meta["sites"].items() for text in _differences(kind, saved, here[kind])]
    if differences:
        raise ValueError(
            f"cannot load {where}: it belongs to a model with other sites: {'; '.join(differences)}; give the model "
            "that was fitted"
        )
    frozen = [_fingerprint(parameter) for parameter in density.frozen.values()]
    if frozen != meta["frozen"]:
        raise ValueError(
            f"cannot load {where}: the frozen parameters that the model captures are others than in the fit "
            f"({len(meta['frozen'])} in the file, {len(frozen)} here); put the same weights into their module first"
        )


def _differences(kind: str, saved: list[Any], here: list[Any]) -> list[str]:
    old, new = dict(saved), dict(here)
    texts = [f"{kind} {name!r} is missing here" for name in old if name not in new]
    texts += [f"{kind} {name!r} is not in the file" for name in new if name not in old]
    texts += [
        f"{kind} {name!r} has shape {tuple(old[name])} in the file, {tuple(new[name])} here"
        for name in old
        if name in new and old[name] != new[name]
    ]
    if not texts and list(old) != list(new):
        texts.append(f"the order of the {kind}s is {list(old)} in the file, {list(new)} here")
    return texts


def check_densities(where: str, meta: Mapping[str, Any], density: TaskDensity, values: Mapping[str, Tensor]) -> None:
    """Refuses a model with the same sites and other densities."""
    here, tolerance = _densities(density, values), TOLERANCE[density.dtype]
    for name, value in meta["densities"].items():
        new = here.get(name, math.nan)
        if not (math.isclose(value, new, rel_tol=tolerance, abs_tol=tolerance) or value != value and new != new):
            raise ValueError(
                f"cannot load {where}: {name} has another density than in the fit (log density {value:.8g} in the "
                f"file, {new:.8g} here); give the model that was fitted, with the same constants"
            )


def with_tried(density: TaskDensity, tried: Mapping[str, Any]) -> Structure:
    """The structure with what was found out by trial on the training data, which may not be here."""
    known = {entry.name for entry in dataclasses.fields(density.structure)}
    found: dict[str, Any] = {name: value for name, value in tried.items() if name in known}
    lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return dataclasses.replace(density.structure, **(found | lists))


def plain(value: Any) -> Any:
    """The value with NumPy's and torch's scalars as Python's."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic | Tensor) and np.ndim(value) == 0:
        return value.item()
    return value
