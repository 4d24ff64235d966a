"""The No-U-Turn sampler on the compiled joint density of θ and all tasks: nutpie, an optional extra.

The reference for awkward posteriors. Task parameters are sampled in whitened coordinates, the non-centred
parametrisation, around where θ puts them (`shear.py`), or as they are where data say much about them (`centring.py`).
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.centring import Centred, informed
from bayesmeta.inference.collected import in_double, rows
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.joint import Joint
from bayesmeta.inference.laplace import LaplaceGuide
from bayesmeta.inference.methods import Inferred
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.options import check_lengths
from bayesmeta.inference.sampling import Drawn, Lengths, positions_of, require_nutpie, sample
from bayesmeta.inference.shared import NormalShared
from bayesmeta.inference.shear import Sheared
from bayesmeta.inference.threads import threads_for
from bayesmeta.inference.training import History

PILOT = 5
"""The first transitions of the warmup, one in so many, look for the coordinates in which the others run."""
LEAST_PILOT = 100
"""With fewer transitions than this there is no such search."""
INSTEAD = "take more warmup and draws, tighter priors, or method='marginal'"


@dataclass(frozen=True)
class NUTS:
    """Options of `method="nuts"`: the full joint posterior of θ and all training tasks.

    Args:
        chains: Number of chains.
        warmup: Transitions that adapt step size and mass matrix, a chain; of 500 and more the first fifth looks for
            coordinates in which tasks depend little on θ.
        draws: Draws kept, a chain.
    """

    chains: int = 4
    warmup: int = 1000
    draws: int = 1000

    def __post_init__(self) -> None:
        check_lengths("NUTS", chains=self.chains, warmup=self.warmup, draws=self.draws)

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
            drawn = self._sampled(precise, tasks, joint, progress)
        size, dim = density.structure.shared_size, density.structure.task_size
        flat = torch.as_tensor(drawn.draws).flatten(0, 1)
        noise = flat[:, size:].reshape(len(flat), len(tasks), dim)
        shared = from_chains(flat[:, :size].to(density.dtype), drawn, noise=noise.to(density.dtype))
        done = not drawn.mixing.bad.any()
        record = {"stage": 0, "steps": 0, "kind": "joint", "error": 0.0, "noise": 0.0, "ess": shared.ess, "done": done}
        record["seconds"] = time.perf_counter() - began
        return Inferred(laplace_guides(density, tasks, shared.theta), shared, History(stages=[record]))

    def _sampled(self, density: TaskDensity, tasks: Tasks, joint: Joint, progress: bool) -> Drawn:
        first = self.warmup // PILOT
        if not joint.shared_size or first < LEAST_PILOT:
            lengths = Lengths(self.chains, self.warmup, self.draws)
            return sample(
                lambda: joint, joint.start, lengths, dim=joint.size, progress=progress, view=joint.view, cure=INSTEAD
            )
        pilot, _ = positions_of(
            lambda: joint, joint.start, Lengths(self.chains, first - first // 4, first // 4), dim=joint.size
        )
        chosen, ends = _coordinates(density, tasks, joint, pilot), pilot[:, -1]
        starts = itertools.cycle(ends if isinstance(chosen, Joint) else chosen.inverse(ends))
        lengths = Lengths(self.chains, self.warmup - first, self.draws)
        return sample(
            lambda: chosen,
            lambda: next(starts),
            lengths,
            dim=joint.size,
            progress=progress,
            view=chosen.view,
            cure=INSTEAD,
        )


def _coordinates(density: TaskDensity, tasks: Tasks, joint: Joint, pilot: np.ndarray) -> Joint | Centred | Sheared:
    """Those in which the tasks depend least on θ, at the positions `(chain, draw, d)` of first draws."""
    if informed(density, tasks, joint, pilot):
        return Centred(density, tasks, joint)
    sheared = Sheared(joint, pilot)
    return sheared if sheared.fits else joint


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
    require_nutpie()


def laplace_guides(density: TaskDensity, tasks: Tasks, theta: Tensor) -> Guides:
    """Guides of methods that learn θ without a network: Laplace proposals around draws of θ `(S, d_theta)`."""
    task = LaplaceGuide.around(theta)
    task.attach(density, tasks)
    return Guides(NormalShared(*density.prior_scale()), task, dict(density.learned.values))


def from_chains(theta: Tensor, drawn: Drawn, *, noise: Tensor | None = None) -> SharedDraws:
    """Draws of θ `(S, d_theta)`, chain after chain, with equal weights; "uncorrected" where they have not mixed."""
    count, size = theta.shape
    own = drawn.mixing.of(slice(size))
    relative = min(1.0, float(own.ess.min()) / count) if size else 1.0
    status = "uncorrected" if own.bad.any() else "sampled"
    weight, chains = np.full(count, -math.log(count)), len(drawn.draws)
    return SharedDraws(theta, weight, 0.0, relative, status, chains, drawn.stats, noise, drawn.mixing)
