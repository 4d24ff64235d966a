"""Bayesian meta-learning for people with many small, related data sets."""

import importlib
from typing import Any

from bayesmeta.data import families
from bayesmeta.data.batch import Batch
from bayesmeta.data.episodes import Episode, Source
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit, fit, load
from bayesmeta.hierarchy import likelihoods, priors
from bayesmeta.hierarchy.model import ConditionalModel, HierarchicalModel, with_conditional
from bayesmeta.inference import guides
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.marginal import Marginal
from bayesmeta.inference.nuts import NUTS
from bayesmeta.inference.pac_bayes import PACBayes
from bayesmeta.inference.protocols import TaskGuide
from bayesmeta.inference.training import Optimizer
from bayesmeta.results.conditional import ConditionalFit, ConditionalPrediction
from bayesmeta.results.posterior import Posterior
from bayesmeta.results.prediction import Prediction
from bayesmeta.results.simulation import simulate

__version__ = "0.1.0"

__all__ = [
    "Amortized",
    "Batch",
    "ConditionalFit",
    "ConditionalModel",
    "ConditionalPrediction",
    "Episode",
    "Fit",
    "HierarchicalModel",
    "Marginal",
    "NUTS",
    "Optimizer",
    "PACBayes",
    "Posterior",
    "Prediction",
    "Source",
    "TaskGuide",
    "Tasks",
    "families",
    "fit",
    "guides",
    "likelihoods",
    "load",
    "priors",
    "simulate",
    "with_conditional",
]

_ROOMS = ("checks", "models")
"""Rooms that are imported when they are first used."""
_CHECKS = ("compare_sharing", "stack_sharing")
"""What is found in `checks` under its own name."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"bayesmeta.{name}")
    if name in _CHECKS:
        return getattr(importlib.import_module("bayesmeta.checks"), name)
    raise AttributeError(f"module 'bayesmeta' has no attribute {name!r}")
