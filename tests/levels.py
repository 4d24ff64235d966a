"""Tasks that differ by their level alone, y = a + ε, a ~ N(0, 1), ε ~ N(0, .3²), for the contracts of the zoo."""

from __future__ import annotations

import ast
import pathlib

import numpy as np
import torch

import bayesmeta as bm

NOISE, ROWS = 0.3, 6


def levels(count: int, seed: int) -> bm.Tasks:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(count, 1)) + NOISE * rng.normal(size=(count, ROWS))
    x = rng.uniform(-2, 2, size=(count, ROWS, 1))
    return bm.Tasks.from_arrays(list(x), list(y), names=[f"{seed}.{i}" for i in range(count)])


def exact(context: bm.Tasks) -> torch.distributions.Normal:
    """The exact predictive of any row of each task `(T, 1)`."""
    batch = context.batch(slice(None))
    precision = 1 + batch.n / NOISE**2
    loc = (batch.y * batch.mask).sum(1) / NOISE**2 / precision
    return torch.distributions.Normal(loc[:, None], (1 / precision + NOISE**2).sqrt()[:, None])


def code_lines(path: pathlib.Path) -> int:
    """Lines of a file that are neither empty nor of a docstring."""
    text = path.read_text(encoding="utf-8")
    nodes = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    docs = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    described = {line for doc in docs for line in range(doc.lineno, (doc.end_lineno or 0) + 1)}
    return sum(bool(line.strip()) and number not in described for number, line in enumerate(text.splitlines(), 1))
