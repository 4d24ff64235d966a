"""The marginal path against exact moments, and its three posteriors of θ."""

from __future__ import annotations

import numpy as np
import pytest
from eight_schools import check_moments, eight_schools, schools

import bayesmeta as bm


def test_eight_schools_by_the_marginal() -> None:
    fit = bm.fit(eight_schools, schools(), method=bm.Marginal(chains=2), progress=False)
    check_moments(fit, 2000)
    assert set(fit.posterior(schools(), draws=10).method) == {"exact"}


def test_the_mode_is_that_of_log_tau_with_the_jacobian() -> None:
    fit = bm.fit(eight_schools, schools(), method=bm.Marginal(shared="map"), progress=False)
    assert float(fit.shared.mean("tau")) == pytest.approx(3.63, abs=0.01)
    assert np.isnan(fit.shared.sd("tau"))
    assert fit.shared.status == "plug-in"


def test_names_of_posteriors() -> None:
    with pytest.raises(ValueError, match=r"shared must be one of \['map', 'normal', 'nuts'\], got 'vi'"):
        bm.Marginal(shared="vi")
