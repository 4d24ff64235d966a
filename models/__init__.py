"""The zoo: one file for each published system, on the public API of bayesmeta alone; imported as `bayesmeta.models`."""

from bayesmeta.models import (
    abml,
    alpaca,
    bayesian_network,
    bmaml,
    class_posterior,
    conditioning,
    embeddings,
    hierarchical_gp,
    latent_gp,
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
    "alpaca",
    "bayesian_network",
    "bmaml",
    "class_posterior",
    "conditioning",
    "embeddings",
    "hierarchical_gp",
    "latent_gp",
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
