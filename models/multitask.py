"""Multi-task learning as a prior: a shared function, task parameters inside it, and how these relate.

Each scheme of the field is one choice of two arguments. What φ_i does to the function is the *conditioning*
(`models/conditioning/`), how the φ_i of all tasks relate is the *sharing prior* (`models/sharing/`); hard sharing,
heads, gates, experts and cross-stitch networks, soft sharing and clusters differ by them alone, and every one gives
posteriors, of new tasks too.

References:
    Ruder: An Overview of Multi-Task Learning in Deep Neural Networks, 2017, https://arxiv.org/abs/1706.05098
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models import conditioning as conditionings
from bayesmeta.models import sharing as sharings
from bayesmeta.models.conditioning.base import Conditioned, Conditioning, Sizes
from bayesmeta.models.conditioning.units import OwnNoise, own_noise, standardized, width
from bayesmeta.models.sharing import Sharing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONINGS: Mapping[str, Conditioning] = {
    "multi_head": conditionings.Heads(),
    "hard": conditionings.Heads(),
    "independent": conditionings.Networks(),
    "concat": conditionings.Concat(),
    "additive": conditionings.Additive(),
    "multiplicative": conditionings.Multiplicative(),
    "film": conditionings.FiLM(),
    "gates": conditionings.Gates(),
    "experts": conditionings.Experts(),
    "cross_stitch": conditionings.Stitch(),
    "sluice": conditionings.Stitch(subspaces=2, skip=True),
}
SHARINGS: Mapping[str, Sharing] = {
    "gaussian": sharings.Gaussian(),
    "laplace": sharings.Laplace(),
    "factors": sharings.Factors(),
    "clusters": sharings.Clusters(),
}
INDEPENDENT_SCALE = 10.0
"""Sd of every weight around the shared ones where networks are independent and nothing else is said."""


def multitask(
    trunk: nn.Module | None = None,
    *,
    conditioning: str | Conditioning = "multi_head",
    sharing: str | Sharing | None = None,
    likelihood: Any = None,
    noise: Literal["shared", "task"] = "shared",
    standardize: bm.Tasks | None = None,
    features: int | None = None,
    seed: int = 0,
) -> Multitask:
    """Builds a multi-task model, to be fitted by `bm.fit` as any other.

    Args:
        trunk: Module `(T, N, *dx) -> (T, N, features)` that all tasks share, used as it is; None for x itself.
        conditioning: What φ_i does: "multi_head", "hard", "independent", "concat", "additive", "multiplicative",
            "film", "gates" (attention over features), "experts", "cross_stitch", "sluice", or one of
            `bm.models.conditioning` with options (`Experts(inputs=…)`: gates of experts that depend on x).
        sharing: How the φ_i relate: "gaussian", "laplace", "factors" (a learned task covariance), "clusters", or one of
            `bm.models.sharing` with options; its `Contaminated` lets some tasks be like no others. None: "gaussian";
            for "independent" a Gaussian of fixed large scale.
        likelihood: One of `bm.likelihoods`, or a function of `(f, batch, shared)`; default `bm.likelihoods.Normal()`.
        noise: "shared", or "task": each task's own, the block `log_noise` of φ, its scale learned with "hard" and
            "independent" too. For normal labels, alone or among `Outputs`; not for `Kinds` or `StudentT`.
        standardize: Tasks whose inputs and normal labels, output by output, give the units that φ and the trunk live
            in; predictions stay in the user's. None for the data as they are; not for `Kinds`, whose kinds share f.
        features: Numbers that the trunk gives for a row, without a trunk the length of x. None: those of its last
            linear layer.
        seed: Of the first weights of heads and layers.

    Returns:
        A `HierarchicalModel` with the task site `phi` `(d,)`, in blocks: `model.sharing.blocks`. Weights of trunk,
        layers and heads that are not the task's own are point estimates: fit with `bm.Amortized`, or `bm.Marginal` with
        `shared="map"` or `"normal"`. Without a trunk, heads ("multi_head", "hard") have none, and every method works.

    Raises:
        ValueError: If a name is unknown, options do not fit together, or the number of features cannot be found.

    Example:
        >>> import bayesmeta as bm
        >>> bm.models.multitask(features=3, sharing="laplace")
        Multitask(Heads, Laplace, Normal; phi: weight (1, 3), bias (1,))
    """
    chosen = _chosen("conditioning", conditioning, CONDITIONINGS, Conditioning)
    prior = _sharing(conditioning, sharing)
    observed = bm.likelihoods.Normal() if likelihood is None else likelihood
    outputs = getattr(observed, "width", 1)
    if outputs is None:
        raise ValueError("multitask: expected Categorical(levels=…), whose number of levels the heads need, got None")
    sizes = Sizes(_features(trunk, features), outputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        function = chosen.build(nn.Identity() if trunk is None else trunk, sizes)
    function, observed = _with_units(function, observed, noise, standardize)
    function.scalar = width(observed) == 1 and not isinstance(observed, bm.likelihoods.Outputs)
    return Multitask(chosen, prior.over(function.blocks), function, observed)


def _with_units(function: Conditioned, observed: Any, noise: str, standardize: Any) -> tuple[Conditioned, Any]:
    if noise not in ("shared", "task"):
        raise ValueError(f'multitask: expected noise="shared" or noise="task", got {noise!r}')
    if not isinstance(standardize, bm.Tasks | None):
        raise ValueError(f"multitask: expected standardize as Tasks or None, got {standardize!r}")
    if noise == "task":
        observed, places = own_noise(observed)
        function = OwnNoise(function, places)
    return (function, observed) if standardize is None else standardized(function, observed, standardize)


class Multitask(bm.HierarchicalModel):
    """A model that `multitask` has built.

    Attributes:
        conditioning: What φ does.
        sharing: The prior of φ, over its blocks.
        function: The module of φ and x.
    """

    def __init__(self, conditioning: Conditioning, sharing: Sharing, function: Conditioned, likelihood: Any) -> None:
        """Puts the parts together; `multitask` calls it."""
        super().__init__(sharing, function, likelihood)
        self.conditioning, self.sharing, self.function = conditioning, sharing, function

    def similarity(self, posterior: bm.Posterior) -> np.ndarray:
        """How alike tasks are as the learned prior sees them: a matrix `(T, T)`, 1 on its diagonal.

        Correlations of task parameters for Gaussian and Laplace priors, of loadings for factors, and for clusters the
        probability to be of the same one.

        Args:
            posterior: Of training tasks, whose draws are joint.
        """
        if isinstance(self.sharing, sharings.Gaussian) and self.sharing.scale == 0 and not self.sharing.scaled:
            raise ValueError("similarity: expected tasks with parameters of their own, got hard sharing: all are alike")
        if not posterior.joint:
            raise ValueError("similarity: expected training tasks, whose draws are joint, got new ones")
        shared = {name: _tensor(posterior.shared[name]) for name in self.sharing.shared}
        return self.sharing.similarity(_tensor(posterior.draws("phi")), shared).numpy()

    def plot_similarity(self, posterior: bm.Posterior, path: str | None = None) -> Figure:
        """A picture of `similarity`, tasks that are alike side by side; saved if a path is given."""
        inner = self.sharing.inner if isinstance(self.sharing, sharings.Contaminated) else self.sharing
        label = "probability to be of one cluster" if isinstance(inner, sharings.Clusters) else "similarity"
        picture = bm.checks.sharing_pictures.similarity(self.similarity(posterior), posterior.names, label=label)
        return _saved(picture, path)

    def plot_scales(self, fit: bm.Fit, path: str | None = None) -> Figure:
        """A picture of the learned scale of each block of φ, in units of φ; saved if a path is given.

        Raises:
            ValueError: If the scale is fixed, or no fit is given.
        """
        if not isinstance(fit, bm.Fit):
            raise ValueError(f"plot_scales: expected the fit, got {type(fit).__name__}")
        if "tau" not in self.sharing.shared:
            raise ValueError("plot_scales: expected a prior that learns its scales, got one of fixed scale")
        shared = {name: _tensor(fit.shared.draws(name)) for name in self.sharing.shared}
        draws = self.sharing.learned_scales(shared).numpy()
        return _saved(bm.checks.sharing_pictures.scales(self.sharing.scaled, draws), path)

    def __repr__(self) -> str:
        parts = ", ".join(type(part).__name__ for part in (self.conditioning, self.sharing, self.likelihood))
        return f"Multitask({parts}; phi: {', '.join(f'{b.name} {b.shape}' for b in self.sharing.blocks.all)})"


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def _saved(figure: Figure, path: str | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure


def _chosen(role: str, value: Any, known: Mapping[str, Any], kind: type) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in known:
        return known[value]
    raise ValueError(
        f"multitask: expected {role} as one of {sorted(known)} or an object of bm.models.{role}, got {value!r}"
    )


def _sharing(conditioning: Any, sharing: Any) -> Sharing:
    if conditioning == "hard":
        if sharing is not None:
            raise ValueError(
                f'multitask: conditioning="hard" has no task parameters to share, got sharing={sharing!r}; leave it out'
            )
        return sharings.Gaussian(scale=0.0)
    if sharing is None:
        return sharings.Gaussian(scale=INDEPENDENT_SCALE if conditioning == "independent" else None)
    result: Sharing = _chosen("sharing", sharing, SHARINGS, Sharing)
    return result


def _features(trunk: nn.Module | None, features: int | None) -> int:
    if trunk is not None and not isinstance(trunk, nn.Module):
        raise ValueError(f"multitask: expected trunk as a module, nn.Linear(…), or None, got {trunk!r}")
    if features is None:
        return _last_width(trunk)
    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
        raise ValueError(f"multitask: expected features as a whole number ≥ 1, got {features!r}")
    return features


def _last_width(trunk: nn.Module | None) -> int:
    parts = () if trunk is None else trunk.modules()
    widths = [part.out_features for part in parts if isinstance(part, nn.Linear)]
    if not widths:
        raise ValueError(
            "multitask: expected features=, the numbers a row has after the trunk (without a trunk the length of x); "
            "they are found by themselves only for a trunk that ends in a linear layer"
        )
    return widths[-1]
