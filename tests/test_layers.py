"""The import direction: data -> hierarchy -> inference -> results -> fitting -> checks, no cycles, no facade inside."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("data", "hierarchy", "inference", "results", "fitting", "checks")
FACADE = "bayesmeta"
ZOO = "bayesmeta.models"
ARVIZ = ("bayesmeta.results.arviz_export", "bayesmeta.inference.psis", "bayesmeta.inference.mixing")

Sources = dict[str, str]
Edges = dict[str, set[str]]


def sources(root: pathlib.Path) -> Sources:
    """Every module of the repository's package by its dotted name; `models/` counts as `bayesmeta.models`."""
    out = {}
    for path in sorted([*(root / "bayesmeta").rglob("*.py"), *(root / "models").rglob("*.py")]):
        parts = list(path.relative_to(root).with_suffix("").parts)
        parts = parts if parts[0] == "bayesmeta" else ["bayesmeta", *parts]
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return out


def imported(name: str, modules: Sources) -> set[str]:
    """What a module imports, anywhere in it: for `from a import b` the module `a.b` if there is one, else `a`."""
    is_package = any(other.startswith(f"{name}.") for other in modules)
    here = name.split(".") if is_package else name.split(".")[:-1]
    out: set[str] = set()
    for node in ast.walk(ast.parse(modules[name])):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            out |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    return out - {name}


def edges(modules: Sources) -> Edges:
    """Which modules of the package each module imports; a room's own name stands for its `__init__`."""
    return {name: imported(name, modules) & modules.keys() for name in modules}


def room(name: str) -> str:
    """The room of a module, "" for the facade."""
    return name.split(".")[1] if "." in name else ""


def wrong_directions(graph: Edges) -> list[str]:
    """Imports of a room to the right, and modules that stand in no room."""
    inside = {name: seen for name, seen in graph.items() if room(name) not in ("", "models")}
    out = [f"{name}: is in no room" for name in inside if room(name) not in ROOMS]
    for name, seen in inside.items():
        for other in seen - {FACADE}:
            if room(name) in ROOMS and room(other) not in ROOMS[: ROOMS.index(room(name)) + 1]:
                out.append(f"{name} imports {other}")
    return sorted(out)


def cyclic(graph: Edges) -> list[str]:
    """Modules that import themselves through others, the facade left out."""
    inside = {name: seen - {FACADE} for name, seen in graph.items() if name != FACADE}
    reach = {name: set(seen) for name, seen in inside.items()}
    for middle in inside:
        for name in inside:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return sorted(name for name, seen in reach.items() if name in seen)


def facade_users(graph: Edges) -> list[str]:
    """Modules inside the rooms that import the facade."""
    return sorted(name for name, seen in graph.items() if FACADE in seen and room(name) not in ("", "models"))


def arviz_users(modules: Sources) -> list[str]:
    """Modules that import ArviZ."""
    return [name for name in modules if any(seen.startswith("arviz") for seen in imported(name, modules))]


def private_users(modules: Sources) -> list[str]:
    """Imports by the zoo of anything of bayesmeta but the facade and the zoo itself."""
    zoo = [name for name in modules if f"{name}.".startswith(f"{ZOO}.")]
    found = [(name, seen) for name in zoo for seen in sorted(imported(name, modules))]
    return [
        f"{name} imports {seen}"
        for name, seen in found
        if seen.startswith(f"{FACADE}.") and not f"{seen}.".startswith(f"{ZOO}.")
    ]


def faults(modules: Sources) -> list[str]:
    """Everything that breaks the rule, a line each."""
    graph = edges(modules)
    return [
        *wrong_directions(graph),
        *(f"{name}: is in an import cycle" for name in cyclic(graph)),
        *(f"{name} imports the facade" for name in facade_users(graph)),
        *(f"{name} imports arviz" for name in arviz_users(modules) if name not in ARVIZ),
        *private_users(modules),
    ]


def test_the_package_keeps_the_rule() -> None:
    found = sources(ROOT)
    assert len(found) > 3, "no modules found: the test would pass on anything"
    assert faults(found) == []


HOUSE = {
    "bayesmeta": "from bayesmeta.fitting import fit\nfrom bayesmeta import models",
    "bayesmeta.data": "",
    "bayesmeta.data.tasks": "import numpy as np",
    "bayesmeta.data.batch": "from bayesmeta.data.tasks import Tasks",
    "bayesmeta.results": "",
    "bayesmeta.results.posterior": "from bayesmeta.data import tasks",
    "bayesmeta.results.arviz_export": "def f():\n    import arviz",
    "bayesmeta.fitting": "from bayesmeta.results.posterior import Posterior",
    "bayesmeta.checks": "",
    "bayesmeta.checks.gap": "from bayesmeta.fitting import fit",
    "bayesmeta.models": "from bayesmeta.models.maml import build",
    "bayesmeta.models.maml": "import bayesmeta as bm\nfrom bayesmeta import Tasks",
}


def test_a_sound_house_has_no_faults() -> None:
    assert faults(HOUSE) == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        (
            "bayesmeta.data.tasks",
            "def f():\n    import bayesmeta.results.posterior",
            "imports bayesmeta.results",
        ),
        ("bayesmeta.data.tasks", "from ..fitting import fit", "imports bayesmeta.fitting"),
        ("bayesmeta.results.posterior", "import bayesmeta.checks.gap", "imports bayesmeta.checks.gap"),
        ("bayesmeta.fitting", "import bayesmeta.models.maml", "imports bayesmeta.models.maml"),
        ("bayesmeta.data.tasks", "from bayesmeta.data.batch import Batch", "cycle"),
        ("bayesmeta.data.tasks", "def f():\n    from . import batch", "cycle"),
        ("bayesmeta.data.tasks", "import bayesmeta", "imports the facade"),
        ("bayesmeta.data.tasks", "from bayesmeta import Tasks", "imports the facade"),
        ("bayesmeta.data.tasks", "from .. import Tasks", "imports the facade"),
        ("bayesmeta.results.posterior", "def f():\n    from arviz import from_dict", "imports arviz"),
        ("bayesmeta.kitchen", "", "is in no room"),
        ("bayesmeta.models.maml", "from bayesmeta.data.tasks import Tasks", "bayesmeta.models.maml imports"),
        ("bayesmeta.models.maml", "def f():\n    from bayesmeta import fitting", "bayesmeta.models.maml imports"),
    ],
)
def test_each_fault_is_found(name: str, text: str, fault: str) -> None:
    assert any(fault in line for line in faults(HOUSE | {name: text}))
