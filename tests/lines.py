"""Lines of each task's own, whose exact predictive is a normal, for the contracts of the zoo."""

from __future__ import annotations

import ast
import pathlib
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributions import Normal

import bayesmeta as bm

NOISE, ROWS = 0.3, 6


@dataclass(frozen=True)
class Lines:
    """y = a + b x + ε, a ~ N(0, 1), b ~ N(tilt, spread²), ε ~ N(0, .3²), six x uniform from -2 to 2."""

    tilt: float = 1.0
    spread: float = 0.2

    def tasks(self, count: int, seed: int) -> bm.Tasks:
        rng = np.random.default_rng(seed)
        level, slope = rng.normal(size=(2, count, 1))
        x = rng.uniform(-2, 2, size=(count, ROWS, 1))
        y = level + (self.tilt + self.spread * slope) * x[..., 0] + NOISE * rng.normal(size=(count, ROWS))
        return bm.Tasks.from_arrays(list(x), list(y), names=[f"{seed}.{i}" for i in range(count)])

    def exact(self, context: bm.Tasks, x: torch.Tensor) -> Normal:
        """The exact predictive of rows x `(T, M, 1)` of each task, `(T, M)`."""
        batch, x = context.batch(slice(None)), x.double()
        old, new = (torch.cat([torch.ones_like(rows), self.spread * rows], -1) for rows in (batch.x.double(), x))
        old = old * batch.mask.unsqueeze(-1)
        covariance = torch.linalg.inv(torch.eye(2, dtype=old.dtype) + old.mT @ old / NOISE**2)
        left = batch.y.double().unsqueeze(-1) - self.tilt * batch.x.double()
        mean = self.tilt * x + new @ covariance @ old.mT @ left / NOISE**2
        return Normal(mean.squeeze(-1), ((new @ covariance * new).sum(-1) + NOISE**2).sqrt())


def lines(count: int, seed: int) -> bm.Tasks:
    return Lines().tasks(count, seed)


def code_lines(path: pathlib.Path) -> int:
    """Lines of a file that are neither empty nor of a docstring."""
    text = path.read_text(encoding="utf-8")
    nodes = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    docs = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    described = {line for doc in docs for line in range(doc.lineno, (doc.end_lineno or 0) + 1)}
    return sum(bool(line.strip()) and number not in described for number, line in enumerate(text.splitlines(), 1))
