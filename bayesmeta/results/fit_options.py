"""The options of a fit as plain data, and back.

Names, numbers and option objects made of them are stored; modules, guides and functions are only described, and must be
given again when a fit is loaded. `fit_storage.py` calls it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from bayesmeta.inference.pac_bayes import PACBayes
from bayesmeta.inference.training import Optimizer

Options = TypeVar("Options")
NESTED = {"Optimizer": Optimizer, "PACBayes": PACBayes}
OBJECT = "object"


def describe(options: Any) -> dict[str, Any]:
    """The options as JSON-able data; an object that cannot be stored becomes `{"object": its name}`."""
    fields = {entry.name: _plain(getattr(options, entry.name)) for entry in dataclasses.fields(options)}
    return {"options": type(options).__name__} | fields


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if type(value) in NESTED.values():
        return describe(value)
    return {OBJECT: getattr(value, "__qualname__", type(value).__qualname__)}


def restored(where: str, plain: Mapping[str, Any], kinds: Mapping[str, type[Any]], given: Any | None) -> Any:
    """Options from their description.

    Args:
        where: The file, for messages.
        plain: What `describe` returned.
        kinds: Classes of options by method.
        given: The same options, needed where they hold objects that cannot be stored.

    Raises:
        ValueError: Objects are missing, or `given` are other options.
    """
    if given is not None:
        check_same(where, plain, describe(given))
        return given
    kind = {cls.__name__: cls for cls in kinds.values()}.get(plain["options"])
    if kind is None:
        raise ValueError(
            f"cannot load {where}: it uses the options {plain['options']}, unknown here; upgrade bayesmeta"
        )
    _check_storable(where, plain)
    return _rebuilt(plain, kind)


def _check_storable(where: str, plain: Mapping[str, Any]) -> None:
    objects = {name: value[OBJECT] for name, value in plain.items() if isinstance(value, dict) and OBJECT in value}
    if objects:
        wanted = ", ".join(f"{name}={value}" for name, value in objects.items())
        raise ValueError(
            f"cannot load {where}: the fit used objects that cannot be stored: {wanted}; give the same options again: "
            f"bm.load(path, model, method=bm.{plain['options']}({', '.join(f'{name}=…' for name in objects)}))"
        )


def _rebuilt(plain: Mapping[str, Any], kind: type[Any]) -> Any:
    return kind(**{name: _value(value) for name, value in plain.items() if name != "options"})


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return _rebuilt(value, NESTED[value["options"]])
    return tuple(value) if isinstance(value, list) else value


def check_same(where: str, stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses other options than the stored ones.

    Raises:
        ValueError: Names the options that differ.
    """
    differ = [name for name in {**stored, **here} if stored.get(name) != here.get(name)]
    if differ:
        pairs = [f"{n}: {_shown(stored.get(n))} in the file, {_shown(here.get(n))} here" for n in differ]
        raise ValueError(f"cannot use {where}: the options differ ({'; '.join(pairs)}); give the same options")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        name = value.get(OBJECT) or value["options"]
        inner = ", ".join(f"{key}={_shown(entry)}" for key, entry in value.items() if key not in (OBJECT, "options"))
        return f"{name}({inner})" if inner else str(name)
    return repr(value)
