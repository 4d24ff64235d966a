"""Markov chains of any density by nutpie's No-U-Turn sampler, an optional extra; a warning where they are bad.

References:
    Hoffman, Gelman: The No-U-Turn Sampler, 2014, https://jmlr.org/papers/v15/hoffman14a.html
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.mixing import MAX_RHAT, MIN_ESS, Mixing, mixing

MAX_DIVERGENT = 0.005
"""Chains with more, or that have not mixed, draw a warning."""
CURE = "take more warmup and draws, or tighter priors"
CLIMB = 40
"""Steps of L-BFGS from there towards a mode before a chain warms up."""
STATS = {"diverging": "diverging", "depth": "tree_depth", "n_steps": "n_steps", "step_size": "step_size", "logp": "lp"}
"""Names of nutpie's diagnostics that are kept, and ArviZ' names for them."""

FURTHEST = 100.0
"""Where a climb leads further away, in prior units, the density has no mode nearby."""

LogDensity = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Position `(d,)` -> log density and its gradient `(d,)`."""


@dataclass(frozen=True)
class Lengths:
    """The number of chains, and of transitions of each that adapt and that are kept."""

    chains: int
    warmup: int
    draws: int


@dataclass(frozen=True)
class Drawn:
    """What a sampler gave: `draws (chain, draw, d)`, diagnostics `{name: (chain, draw)}`, R-hat and ESS `(d,)`."""

    draws: np.ndarray
    stats: dict[str, np.ndarray]
    mixing: Mixing


def sample(
    make_log_density: Callable[[], LogDensity],
    start: Callable[[], np.ndarray],
    lengths: Lengths,
    *,
    progress: bool = False,
    dim: int | None = None,
    view: Callable[[np.ndarray], np.ndarray] = np.asarray,
    cure: str = CURE,
) -> Drawn:
    """Samples a density with nutpie, chains one after another.

    Args:
        make_log_density: Makes the density that one chain calls; what is not finite is rejected.
        start: Draws a position `(d,)` where a chain may start.
        lengths: Of the chains.
        progress: Whether to show nutpie's bar.
        dim: The length of a position; by default that of a start.
        view: Positions `(chain, draw, d)` as the draws that are wanted.
        cure: What to do about chains that are bad, for the warning.

    Raises:
        ValueError: nutpie is not installed, or every start has density zero.
    """
    positions, stats = positions_of(make_log_density, start, lengths, progress=progress, dim=dim)
    return _judged(view(positions), stats, cure)


def positions_of(
    make_log_density: Callable[[], LogDensity],
    start: Callable[[], np.ndarray],
    lengths: Lengths,
    *,
    progress: bool = False,
    dim: int | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `sample`, but the positions `(chain, draw, d)` and nutpie's diagnostics `(chain, draw)` as they are."""
    nutpie, dim = require_nutpie(), len(start()) if dim is None else dim
    failures: list[Exception] = []

    def initial(chain_seed: int) -> np.ndarray:
        with seeded(chain_seed):
            return start()

    model = nutpie.compiled_pyfunc.from_pyfunc(
        dim,
        lambda: _Guarded(make_log_density(), failures),
        lambda *_: lambda position: {"position": position},
        ["float64"],
        [(dim,)],
        ["position"],
        make_initial_point_fn=initial,
    )
    options = {"cores": 1, "progress_bar": progress, "save_warmup": False, "seed": int(torch.randint(2**31, ()))}
    try:
        trace = nutpie.sample(model, draws=lengths.draws, tune=lengths.warmup, chains=lengths.chains, **options)
    except RuntimeError as error:
        cause = failures[0] if failures else error
        said = str(cause).split("\n", maxsplit=1)[0]  # nutpie appends a backtrace of its own
        raise ValueError(f"sampling has failed: {said}; check that the density is finite where the prior is") from cause
    if failures:
        raise failures[0]
    kept = {name: np.asarray(trace.sample_stats[key]) for key, name in STATS.items() if key in trace.sample_stats}
    stats = {name: values.astype(np.int64) if values.dtype.kind == "u" else values for name, values in kept.items()}
    return np.asarray(trace.posterior["position"]), stats


class _Guarded:
    """A log density for nutpie, which cannot bear exceptions: it gets NaN, which it rejects, the caller the first."""

    def __init__(self, function: LogDensity, failures: list[Exception]) -> None:
        self._function, self._failures, self._called = function, failures, False

    def __call__(self, position: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and gradient."""
        if not self._called:
            self._called = True
            _stay_attached()
        if not self._failures:
            try:
                return self._function(position)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                pass
            except Exception as error:
                self._failures.append(error)
        return math.nan, np.zeros(len(position))


def _stay_attached() -> None:
    """Keeps what Python knows of this thread for its next call: of threads that others start it forgets it after each.

    Making it anew takes a fifth of a sampler's time. What is kept is some tens of kilobytes a thread at most.
    """
    ctypes.pythonapi.PyGILState_Ensure()


def _judged(draws: np.ndarray, stats: dict[str, np.ndarray], cure: str) -> Drawn:
    """Adds R-hat and effective sample sizes, and warns where they are bad."""
    found = mixing(draws)
    divergent = float(stats["diverging"].mean()) if "diverging" in stats else 0.0
    if found.bad.any() or not divergent <= MAX_DIVERGENT:
        warnings.warn(
            f"the chains have not mixed well: largest R-hat {found.rhat.max():.3f} (limit {MAX_RHAT}), least effective "
            f"sample size {found.ess.min():.0f} (limit {MIN_ESS:.0f}), {100 * divergent:.1f} % divergent transitions; "
            f"{cure}",
            stacklevel=2,
        )
    return Drawn(draws, stats, found)


def climbed(function: LogDensity, start: Tensor) -> np.ndarray:
    """A position `(d,)` after a few steps of L-BFGS from `start`; the start itself where that fails or runs away."""
    at = start.clone().requires_grad_()
    search = torch.optim.LBFGS([at], max_iter=CLIMB, line_search_fn="strong_wolfe")

    def closure() -> float:
        value, gradient = function(at.detach().numpy())
        at.grad = -torch.as_tensor(gradient)
        return -value if math.isfinite(value) else math.inf

    try:
        search.step(closure)
        reached = math.isfinite(closure()) and float((at.detach() - start).abs().max()) < FURTHEST
    except (RuntimeError, ValueError, ArithmeticError):  # a chain meets it again, and says so
        reached = False
    return (at.detach() if reached else start).numpy()


def require_nutpie() -> Any:
    """The optional package."""
    try:
        import nutpie
        import nutpie.compiled_pyfunc
    except ImportError as error:
        raise ValueError("sampling needs nutpie; install it with: pip install 'bayesmeta[nuts]'") from error
    return nutpie
