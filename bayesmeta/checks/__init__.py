"""Room five: is it right, and how do I see it? Calibration, coverage, misfit, scores, ways of sharing, plots."""

from bayesmeta.checks import metrics, plots, sharing, sharing_pictures
from bayesmeta.checks.calibration import Calibration, sbc
from bayesmeta.checks.cross_validation import LeftOut, leave_one_task_out, loo
from bayesmeta.checks.folds import SharingScores, compare_sharing, stack_sharing
from bayesmeta.checks.gap import Gap, amortization_gap
from bayesmeta.checks.intervals import Coverage, coverage
from bayesmeta.checks.misfits import Misfit, misfit
from bayesmeta.checks.refits import sbc_fit
from bayesmeta.checks.replicated import Replicated, posterior_predictive

__all__ = [
    "Calibration",
    "Coverage",
    "Gap",
    "LeftOut",
    "Misfit",
    "Replicated",
    "SharingScores",
    "amortization_gap",
    "compare_sharing",
    "coverage",
    "leave_one_task_out",
    "loo",
    "metrics",
    "misfit",
    "plots",
    "posterior_predictive",
    "sbc",
    "sbc_fit",
    "sharing",
    "sharing_pictures",
    "stack_sharing",
]
