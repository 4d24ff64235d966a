"""The zoo: one file for each published system, on the public API of bayesmeta alone; imported as `bayesmeta.models`."""

from bayesmeta.models import (
    conditioning,
    embeddings,
    neural_processes,
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
    "conditioning",
    "embeddings",
    "meta_analysis",
    "multitask",
    "neural_processes",
    "prototypes",
    "shared_process",
    "sharing",
    "versa",
]
