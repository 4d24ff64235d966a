"""The No-U-Turn sampler on the compiled joint density of θ and all tasks: nutpie, an optional extra.

The reference for awkward posteriors. Task parameters are sampled in whitened coordinates, which is the non-centred
parametrisation. The marginal path uses the same sampler for θ alone.

References:
    Hoffman, Gelman: The No-U-Turn Sampler, 2014, https://jmlr.org/papers/v15/hoffman14a.html
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.collected import Block, Collected, in_double, rows
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.laplace import LaplaceGuide
from bayesmeta.inference.methods import Inferred
from bayesmeta.inference.mixing import mixing
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.shared import NormalShared
from bayesmeta.inference.threads import threads_for
from bayesmeta.inference.training import History

MAX_RHAT = 1.05
MIN_ESS = 100.0
MAX_DIVERGENT = 0.005
"""Chains beyond these bounds draw a warning."""
SHORTEST = 8
"""Chains with fewer draws have no diagnostics."""
JITTER = 0.1
"""Standard deviation of the chains' starts around the prior's centre, in prior units."""
CLIMB = 40
"""Steps of L-BFGS from there towards a mode before a chain warms up."""
STATS = {"diverging": "diverging", "depth": "tree_depth", "n_steps": "n_steps", "step_size": "step_size", "logp": "lp"}
"""Names of nutpie's diagnostics that are kept, and ArviZ' names for them."""

FURTHEST = 100.0
"""Where a climb leads further away, in prior units, the density has no mode nearby."""

LogDensity = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""Position `(d,)` -> log density and its gradient `(d,)`."""


@dataclass(frozen=True)
class NUTS:
    """Options of `method="nuts"`: the full joint posterior of θ and all training tasks.

    Args:
        chains: Number of chains.
        warmup: Transitions that adapt step size and mass matrix, a chain.
        draws: Draws kept, a chain.
    """

    chains: int = 4
    warmup: int = 1000
    draws: int = 1000

    def __post_init__(self) -> None:
        check_lengths("NUTS", self.chains, self.warmup, self.draws)

    def build(self, density: TaskDensity, tasks: Tasks) -> Guides:
        """Guides that infer tasks given draws of θ; a stored state fills them."""
        return laplace_guides(density, tasks, density.initial_theta().expand(2, -1))

    def learn(self, density: TaskDensity, tasks: Tasks, *, progress: bool, checkpoint: Any) -> Inferred:
        """Samples θ and the parameters of all tasks.

        Raises:
            ValueError: nutpie is missing, the model has parameters to be trained, or a checkpoint is asked for.
        """
        check_samplable("nuts", density, checkpoint, trains=False)
        began = time.perf_counter()
        precise = in_double(density, tasks)
        with threads_for(rows(tasks)):
            joint = Joint(precise, tasks)
            lengths = {"chains": self.chains, "warmup": self.warmup, "draws": self.draws}
            drawn = sample(lambda: joint, joint.start, dim=joint.size, progress=progress, view=joint.view, **lengths)
        size, dim = density.structure.shared_size, density.structure.task_size
        flat = torch.as_tensor(drawn.draws).flatten(0, 1)
        noise = flat[:, size:].reshape(len(flat), len(tasks), dim)
        shared = from_chains(flat[:, :size].to(density.dtype), drawn, noise=noise.to(density.dtype))
        record = {"stage": 0, "steps": 0, "kind": "joint", "error": 0.0, "noise": 0.0, "ess": shared.ess, "done": True}
        record["seconds"] = time.perf_counter() - began
        return Inferred(laplace_guides(density, tasks, shared.theta), shared, History(stages=[record]))


class Joint:
    """The compiled log joint of θ and the noise of all tasks: position `(d_theta + T d,)`, in prior units of θ."""

    def __init__(self, density: TaskDensity, tasks: Tasks) -> None:
        self._collected = collected = Collected(density, tasks)
        self._size, self._dim = density.structure.shared_size, density.structure.task_size
        self.size = self._size + collected.count * self._dim
        self._origin, self._scale = density.prior_scale()
        self._functions = collected.compiled(self._value_and_gradient, self._example)

    def _example(self, block: Block) -> tuple[Tensor]:
        return (torch.zeros(self._size + block.count * self._dim, dtype=torch.float64),)

    def _value_and_gradient(self, block: Block, position: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Of θ and the noise of a block."""
        with torch.enable_grad():
            at = position.detach().requires_grad_()
            theta = self._origin + self._scale * at[: self._size]
            noise = at[self._size :].reshape(-1, self._dim)
            parts = block.by_piece(lambda graph, *args: graph(*args[:2], *args[2]).sum(), theta, noise, leaves)
            prior = self._collected.log_prior(theta, leaves[len(leaves) - len(self._collected.values) :])
            total = prior / len(self._collected.blocks) + torch.stack(parts).sum()
            (gradient,) = torch.autograd.grad(total, at)
        return total.detach(), gradient

    def start(self) -> np.ndarray:
        """A position near one that is some steps uphill from near the prior's centre."""
        near, uphill = (JITTER * torch.randn(self.size, dtype=torch.float64) for _ in range(2))
        return climbed(self, near) + uphill.numpy()

    def view(self, positions: np.ndarray) -> np.ndarray:
        """Positions `(chain, draw, d)` as θ and the noise of the tasks in their own order."""
        at = torch.as_tensor(positions)
        noise = at[..., self._size :].unflatten(-1, (self._collected.count, self._dim))[..., self._collected.order, :]
        return torch.cat([self._origin + self._scale * at[..., : self._size], noise.flatten(-2)], -1).numpy()

    def __call__(self, position: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and its gradient."""
        at = torch.as_tensor(position)
        if len(self._functions) == 1:
            value, gradient = self._functions[0](at)
            return float(value), gradient.numpy()
        return self._in_blocks(at)

    def _in_blocks(self, at: Tensor) -> tuple[float, np.ndarray]:
        widths = [block.count * self._dim for block in self._collected.blocks]
        theta, total, head, tail = at[: self._size], 0.0, torch.zeros(self._size, dtype=at.dtype), []
        for function, noise in zip(self._functions, at[self._size :].split(widths), strict=True):
            value, gradient = function(torch.cat([theta, noise]))
            total, head = total + float(value), head + gradient[: self._size]
            tail.append(gradient[self._size :])
        return total, torch.cat([head, *tail]).numpy()


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


def check_lengths(name: str, chains: int, warmup: int, draws: int) -> None:
    """Refuses chains that are no positive whole numbers."""
    for option, value in (("chains", chains), ("warmup", warmup), ("draws", draws)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {option} must be a whole number of at least 1, got {value!r}")


def check_samplable(method: str, density: TaskDensity, checkpoint: Any, *, trains: bool) -> None:
    """Refuses what a method cannot do: train parameters with Markov chains, go on from a checkpoint."""
    if checkpoint is not None:
        raise ValueError(f"method={method!r} keeps no checkpoint; leave checkpoint= out")
    if trains:
        return
    if density.learned.values:
        raise ValueError(
            f"method={method!r} samples all parameters, but the model trains {sorted(density.learned.values)} "
            "(pyro.param or pyro.module) as point estimates; freeze the module (net.requires_grad_(False)), or use "
            'method="amortized", bm.Marginal(shared="map") or bm.Marginal(shared="normal")'
        )
    _nutpie()


def _nutpie() -> Any:
    """The optional package."""
    try:
        import nutpie
        import nutpie.compiled_pyfunc
    except ImportError as error:
        raise ValueError("sampling needs nutpie; install it with: pip install 'bayesmeta[nuts]'") from error
    return nutpie


def laplace_guides(density: TaskDensity, tasks: Tasks, theta: Tensor) -> Guides:
    """Guides of methods that learn θ without a network: Laplace proposals around draws of θ `(S, d_theta)`."""
    task = LaplaceGuide.around(theta)
    task.attach(density, tasks)
    return Guides(NormalShared(*density.prior_scale()), task, dict(density.learned.values))


@dataclass(frozen=True)
class Drawn:
    """What a sampler gave: `draws (chain, draw, d)`, diagnostics `{name: (chain, draw)}`, R-hat and ESS `(d,)`."""

    draws: np.ndarray
    stats: dict[str, np.ndarray]
    rhat: np.ndarray
    ess: np.ndarray


def from_chains(theta: Tensor, drawn: Drawn, *, noise: Tensor | None = None) -> SharedDraws:
    """Draws of θ `(S, d_theta)`, chain after chain, with equal weights."""
    count = len(theta)
    relative = min(1.0, float(drawn.ess.min()) / count) if drawn.ess.size else 1.0
    return SharedDraws(
        theta, np.full(count, -math.log(count)), 0.0, relative, "sampled", len(drawn.draws), drawn.stats, noise
    )


def sample(
    make_log_density: Callable[[], LogDensity],
    start: Callable[[], np.ndarray],
    *,
    chains: int,
    warmup: int,
    draws: int,
    progress: bool,
    dim: int | None = None,
    view: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Drawn:
    """Samples a density with nutpie, chains one after another.

    Args:
        make_log_density: Makes the density that one chain calls; what is not finite is rejected.
        start: Draws a position `(d,)` where a chain may start.
        chains: Number of chains.
        warmup: Transitions of adaptation, a chain.
        draws: Draws kept, a chain.
        progress: Whether to show nutpie's bar.
        dim: The length of a position; by default that of a start.
        view: Positions `(chain, draw, d)` as the draws that are wanted.

    Raises:
        ValueError: nutpie is not installed, or every start has density zero.
    """
    nutpie, dim = _nutpie(), len(start()) if dim is None else dim
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
        trace = nutpie.sample(model, draws=draws, tune=warmup, chains=chains, **options)
    except RuntimeError as error:
        cause = failures[0] if failures else error
        raise ValueError(
            f"sampling has failed: {cause}; check that the density is finite where the prior is"
        ) from cause
    if failures:
        raise failures[0]
    found = view(np.asarray(trace.posterior["position"]))
    kept = {name: np.asarray(trace.sample_stats[key]) for key, name in STATS.items() if key in trace.sample_stats}
    stats = {name: values.astype(np.int64) if values.dtype.kind == "u" else values for name, values in kept.items()}
    return _judged(found, stats)


class _Guarded:
    """A log density for nutpie, which cannot bear exceptions: it gets NaN, which it rejects, the caller the first."""

    def __init__(self, function: LogDensity, failures: list[Exception]) -> None:
        self._function, self._failures = function, failures

    def __call__(self, position: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density and gradient."""
        if not self._failures:
            try:
                return self._function(position)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                pass
            except Exception as error:
                self._failures.append(error)
        return math.nan, np.zeros(len(position))


def _judged(draws: np.ndarray, stats: dict[str, np.ndarray]) -> Drawn:
    """Adds R-hat and effective sample sizes, and warns where they are bad."""
    _, count, dim = draws.shape
    rhat, ess = mixing(draws) if count >= SHORTEST else (np.full(dim, math.inf), np.zeros(dim))
    divergent = float(stats["diverging"].mean()) if "diverging" in stats else 0.0
    if not (rhat.max() <= MAX_RHAT and ess.min() >= MIN_ESS and divergent <= MAX_DIVERGENT):
        warnings.warn(
            f"the chains have not mixed well: largest R-hat {rhat.max():.3f} (limit {MAX_RHAT}), least effective "
            f"sample size {ess.min():.0f} (limit {MIN_ESS:.0f}), {100 * divergent:.1f} % divergent transitions; take "
            "more warmup and draws, tighter priors, or method='marginal'",
            stacklevel=2,
        )
    return Drawn(draws, stats, rhat, ess)
