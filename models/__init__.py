"""The zoo: one file for each published system, on the public API of bayesmeta alone; imported as `bayesmeta.models`."""

from bayesmeta.models import (
    abml,
    bayesian_network,
    bmaml,
    conditioning,
    embeddings,
    maml,
    neural_processes,
    pacoh_gp,
    pacoh_nn,
    platipus,
    prototypes,
    shared_process,
    sharing,
    versa,
)
from bayesmeta.models.meta_analysis import MetaAnalysis, meta_analysis
from bayesmeta.models.multitask import Multitask, multitask

__all__ = [
    "MetaAnalysis",
    "Multitask",
    "abml",
    "bayesian_network",
    "bmaml",
    "conditioning",
    "embeddings",
    "maml",
    "meta_analysis",
    "multitask",
    "neural_processes",
    "pacoh_gp",
    "pacoh_nn",
    "platipus",
    "prototypes",
    "shared_process",
    "sharing",
    "versa",
]
