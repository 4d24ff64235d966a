"""Conditionings of `multitask`: what a task's parameters do to the function that all tasks share."""

from bayesmeta.models.conditioning.base import Conditioned, Conditioning
from bayesmeta.models.conditioning.experts import Experts
from bayesmeta.models.conditioning.features import Additive, Concat, FiLM, Multiplicative
from bayesmeta.models.conditioning.gates import Gates
from bayesmeta.models.conditioning.heads import Heads
from bayesmeta.models.conditioning.networks import Networks
from bayesmeta.models.conditioning.stitch import Stitch

__all__ = [
    "Additive",
    "Concat",
    "Conditioned",
    "Conditioning",
    "Experts",
    "FiLM",
    "Gates",
    "Heads",
    "Multiplicative",
    "Networks",
    "Stitch",
]
