"""The zoo: one file for each published system, on the public API of bayesmeta alone; imported as `bayesmeta.models`."""

from bayesmeta.models.meta_analysis import MetaAnalysis, meta_analysis

__all__ = ["MetaAnalysis", "meta_analysis"]
