"""The only file that knows ArviZ: named NumPy arrays in, `InferenceData` (ArviZ 0.2x) or `DataTree` (ArviZ 1.x) out.

Which draws and data belong into which group is decided by `posterior.py` and `fitting.py`, which call `to_arviz`. ArviZ
is imported on the first call, and nothing else of bayesmeta is imported at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

SAMPLED = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "prior",
    "prior_predictive",
    "sample_stats",
)
DATA = ("observed_data", "constant_data")

Groups = Mapping[str, Mapping[str, np.ndarray]]
Attribute = str | int | float | bool


def to_arviz(
    groups: Groups,
    *,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, Attribute] | None = None,
) -> Any:
    """Build what the installed ArviZ works with; its `.to_netcdf(path)` writes a file that both generations read.

    Args:
        groups: Arrays by group and name. In `SAMPLED` groups they are `(chain, draw, *shape)`, the same number of
            chains and draws throughout a group; in `DATA` groups `(*shape)`. A group without arrays is left out.
        dims: The names of the axes of `shape` by variable, for every group in which the variable occurs; a
            `log_likelihood` array, which has lost its event axes, takes the first of them. Default: `name_dim_0`, ...
        coords: The labels along a named axis, such as the names of the tasks; default 0, 1, ...
        attrs: Remarks on the whole, for instance that the tasks were inferred independently of each other.

    Returns:
        `arviz.InferenceData` with ArviZ 0.2x, `xarray.DataTree` with ArviZ 1.x.

    Raises:
        ValueError: If a group is unknown, an array has no chain and draw axes or other ones than its group, its axes do
            not match `dims` or `coords`, labels occur twice, or a remark is no string or number.
    """
    kept = {group: {name: np.asarray(a) for name, a in arrays.items()} for group, arrays in groups.items() if arrays}
    labels = _labels(coords or {})
    axes = {group: _checked(group, arrays, dims or {}, labels) for group, arrays in kept.items()}
    remarks = {name: _remark(name, value) for name, value in (attrs or {}).items()}
    return _assemble(_arviz(), kept, _merged(axes), labels, remarks)


def _arviz() -> ModuleType:
    """ArviZ, without the notice about its next generation that 0.23 gives as a warning at its first import of a day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _assemble(
    arviz: ModuleType,
    groups: Groups,
    dims: dict[str, list[str]],
    coords: dict[str, np.ndarray],
    attrs: dict[str, str | int | float],
) -> Any:
    """Call that generation's `from_dict`."""
    if int(arviz.__version__.partition(".")[0]) >= 1:
        return arviz.from_dict(groups, dims=dims, coords=coords, attrs={"/": attrs}, check_conventions=False)
    with warnings.catch_warnings():
        # 0.2x takes more chains than draws for a mix-up of the two axes.
        warnings.filterwarnings("ignore", message="More chains", category=UserWarning)
        return arviz.from_dict(**groups, dims=dims, coords=coords, attrs=attrs)


def _labels(coords: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """The labels as arrays: one for each place, each of them once."""
    labels = {axis: np.asarray(values) for axis, values in coords.items()}
    for axis, values in labels.items():
        if values.ndim != 1 or len(set(values.tolist())) != len(values):
            raise ValueError(f"coords[{axis!r}]: expected a list of different labels, got {values.tolist()!r:.200}")
    return labels


def _checked(
    group: str,
    arrays: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    labels: dict[str, np.ndarray],
) -> dict[str, list[str]]:
    """The axis names of a group's arrays, everything about them checked."""
    _check_group(group, arrays)
    axes = {name: _axes(group, name, array, dims.get(name)) for name, array in arrays.items()}
    for name, array in arrays.items():
        _check_sizes(f"{group}[{name!r}]", axes[name], _event_shape(group, array), labels)
    return axes


def _event_shape(group: str, array: np.ndarray) -> tuple[int, ...]:
    """The shape without chains and draws."""
    return array.shape[2:] if group in SAMPLED else array.shape


def _check_group(group: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Known group; chains and draws there, and the same for all its arrays."""
    if group not in SAMPLED + DATA:
        raise ValueError(f"unknown group {group!r}: expected one of {', '.join(SAMPLED + DATA)}")
    if group in DATA:
        return
    first, shape = next(iter(arrays.items()))[0], next(iter(arrays.values())).shape[:2]
    for name, array in arrays.items():
        if array.ndim < 2:
            raise ValueError(
                f"{group}[{name!r}]: expected axes (chain, draw, ...), got shape {array.shape}; add a chain axis with "
                "array[None]"
            )
        if array.shape[:2] != shape:
            raise ValueError(
                f"{group}[{name!r}]: expected {shape} chains and draws as in {first!r}, got {array.shape[:2]}; give "
                "every array of a group the same draws"
            )


def _axes(group: str, name: str, array: np.ndarray, given: Sequence[str] | None) -> list[str]:
    """The axis names of one array."""
    rank = len(_event_shape(group, array))
    if given is None:
        return [f"{name}_dim_{k}" for k in range(rank)]
    axes = list(given)[:rank] if group == "log_likelihood" else list(given)
    if len(axes) != rank:
        raise ValueError(
            f"{group}[{name!r}]: dims names {len(axes)} axes ({', '.join(axes)}), but an array of shape {array.shape} "
            f"has {rank} there{' besides chain and draw' if group in SAMPLED else ''}; name each of them once"
        )
    return axes


def _check_sizes(where: str, axes: list[str], shape: tuple[int, ...], labels: dict[str, np.ndarray]) -> None:
    """As many places along an axis as it has labels."""
    for axis, size in zip(axes, shape, strict=True):
        if axis in labels and len(labels[axis]) != size:
            raise ValueError(
                f"{where}: axis {axis!r} has length {size}, but coords[{axis!r}] has {len(labels[axis])} labels; give "
                "one label for each place"
            )


def _merged(named: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    """Axis names by variable, since ArviZ takes one list for all groups; a log likelihood's are the first of them."""
    out = dict(named.get("log_likelihood", {}))
    first: dict[str, str] = {}
    for group in (group for group in named if group != "log_likelihood"):
        for name, axes in named[group].items():
            if first.setdefault(name, group) != group and len(out[name]) != len(axes):
                raise ValueError(
                    f"{group}[{name!r}] has {len(axes)} axes besides chain and draw and {first[name]}[{name!r}] has "
                    f"{len(out[name])}; give them the same axes or different names"
                )
            out[name] = axes
    return out


def _remark(name: str, value: Attribute) -> str | int | float:
    """What netCDF can hold; it has no booleans."""
    if not isinstance(value, str | int | float | np.integer | np.floating):
        raise ValueError(f"attrs[{name!r}]: expected a string or a number, got {type(value).__name__}; use str()")
    return int(value) if isinstance(value, bool) else value


def loo(log_likelihood: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's leave-one-out log predictive density of every row.

    Args:
        log_likelihood: Equally weighted independent draws, `(draw, row)`.

    Returns:
        Log predictive densities and k̂, `(row,)` each.
    """
    arviz = _arviz()
    data = to_arviz({"log_likelihood": {"y": log_likelihood[None]}}, dims={"y": ["row"]})
    with warnings.catch_warnings():
        # k̂ is returned and judged by the caller.
        warnings.simplefilter("ignore")
        found = arviz.loo(data, pointwise=True, var_name="y", reff=1.0)
    later = int(arviz.__version__.partition(".")[0]) >= 1
    pointwise = found.elpd_i if later else found.loo_i
    return np.asarray(pointwise), np.asarray(found.pareto_k)
