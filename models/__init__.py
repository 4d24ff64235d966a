"""The zoo: one file for each published system, on the public API of bayesmeta alone; imported as `bayesmeta.models`."""

from bayesmeta.models import alpaca, conditioning, hierarchical_gp, neural_processes, sharing
from bayesmeta.models.meta_analysis import MetaAnalysis, meta_analysis
from bayesmeta.models.multitask import Multitask, multitask

__all__ = [
    "MetaAnalysis",
    "Multitask",
    "alpaca",
    "conditioning",
    "hierarchical_gp",
    "meta_analysis",
    "multitask",
    "neural_processes",
    "sharing",
]
