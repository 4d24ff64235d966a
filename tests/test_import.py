"""Importing the package: nothing global changes, and nothing slow is loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys

LOOK = """
import logging, random, sys, warnings
import numpy, pyro, torch

def state():
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "validation": torch.distributions.Distribution._validate_args,
        "checks": pyro.settings.get(),
        "store": list(pyro.get_param_store()),
        "warnings": list(warnings.filters),
        "logging": (list(logging.root.handlers), logging.root.level, logging.getLogger("bayesmeta").handlers),
        "hooks": (sys.excepthook, sys.displayhook),
    }

before, loaded = state(), set(sys.modules)
import bayesmeta
after = state()
for name in before:
    assert before[name] == after[name], name
slow = {"sympy", "arviz", "arviz_stats", "nutpie", "zuko", "matplotlib", "pandas", "scipy"}
slow |= {"torch._inductor", "torch._dynamo"}
assert not slow & (set(sys.modules) - loaded), slow & (set(sys.modules) - loaded)
"""


def test_the_import_changes_nothing_and_loads_nothing_slow() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
