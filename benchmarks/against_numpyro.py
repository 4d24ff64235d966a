"""Effective draws per CPU second beside NumPyro: `python -m benchmarks.against_numpyro [--help]`; needs NumPyro.

Every run is a process of its own on one core, 2 × (1000 + 1000) transitions; the runs of all samplers alternate.
Counted are the CPU seconds from the data to the draws, compilation included, and the least bulk ESS of all parameters.
Cold runs find empty compilation caches, warm ones those of an earlier process. NumPyro's variant (centred or not, 32 or
64 bit) is the one that was fastest with seed 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

BARS = {"radon": (3.0, 5.0), "schools": (0.6, 2.0), "counts": (0.7, 1.5)}
"""Marginal / NumPyro, cold and warm."""
NUTS_BAR = 0.9
"""method="nuts" / NumPyro, warm."""
VARIANTS = tuple(f"{centring}/{bits}" for centring in ("non-centred", "centred") for bits in (32, 64))
OWN = ("marginal", "nuts")


def run(model: str, sampler: str, seed: int, cache: Path) -> float:
    """Effective draws per CPU second of one process."""
    found = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch" / sampler),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax" / sampler),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "benchmarks.sampler_worker", model, sampler, str(seed)]
    done = subprocess.run(command, env=os.environ | found, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{model}, {sampler}, seed {seed}: {done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    rate = result["ess"] / result["cpu"]
    print(
        f"    {sampler:15s} seed {seed}: ESS {result['ess']:6.0f} in {result['cpu']:5.1f} CPU s, {rate:6.1f} a second, "
        f"R-hat {result['rhat']:.3f}",
        flush=True,
    )
    return float(rate)


def compare(model: str, seeds: Iterable[int], folder: Path) -> None:
    """Prints the rates of one model and their ratios."""
    kept = folder / model
    print(f"{model}: choice of NumPyro's variant", flush=True)
    first = {
        state: {v: run(model, v, 0, kept) for v in (*VARIANTS, *(OWN if state == "cold" else ()))}
        for state in ("cold", "warm")
    }
    for warm, state in enumerate(("cold", "warm")):
        best = max(VARIANTS, key=lambda v: first[state][v])
        print(f"{model}, {state}, NumPyro {best}", flush=True)
        rates: dict[str, list[float]] = {sampler: [] for sampler in (*OWN, best)}
        for seed in seeds:
            for sampler, found in rates.items():
                with tempfile.TemporaryDirectory() as empty:
                    found.append(run(model, sampler, seed, kept if warm else Path(empty)))
        mean = {sampler: float(np.mean(found)) for sampler, found in rates.items()}
        for own in OWN:
            bar = BARS[model][warm] if own == "marginal" else NUTS_BAR if warm else 0.0
            ratio = mean[own] / mean[best]
            said = f" (bar {bar}){'' if ratio >= bar else '   MISSED'}" if bar else ""
            print(
                f"  {model}, {state}: {own} {mean[own]:.0f} / NumPyro {mean[best]:.0f} = {ratio:.2f}{said}", flush=True
            )


def main() -> None:
    """Compares the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("all", *BARS), default="all")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for model in BARS if options.model == "all" else (options.model,):
            compare(model, range(1, options.seeds + 1), Path(folder))


if __name__ == "__main__":
    main()
