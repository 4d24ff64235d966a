"""Families of tasks: what a learner is held against, and what is known to be the best.

Each family draws tasks (`simulate`) and episodes (`episodes`) and, where it is known, gives the Bayes-optimal
predictive (`oracle`), the joint log density of new rows (`joint_log_prob`) and the evidence of tasks (`log_evidence`).
`ImageClasses` draws classification tasks from labelled images, without end.
"""

from bayesmeta.data.families.base import Family
from bayesmeta.data.families.cauchy import Cauchy
from bayesmeta.data.families.drifting import DriftingSinusoids
from bayesmeta.data.families.gaussian_processes import GaussianProcesses
from bayesmeta.data.families.image_classes import ImageClasses
from bayesmeta.data.families.kernels import KERNELS
from bayesmeta.data.families.sawtooth import Sawtooth
from bayesmeta.data.families.sinusoids import SinusoidOrLine, Sinusoids

__all__ = [
    "KERNELS",
    "Cauchy",
    "DriftingSinusoids",
    "Family",
    "GaussianProcesses",
    "ImageClasses",
    "Sawtooth",
    "SinusoidOrLine",
    "Sinusoids",
]
