"""Arguments in every form that is allowed; what is refused stands in `test_meta_analysis.py`."""

from __future__ import annotations

import numpy as np

from bayesmeta.models.random_effects.arguments import design_matrix, labels, normal_prior


def test_covariates_in_every_form() -> None:
    names, rows = design_matrix({"dose": [1, 2], "age": [3, 4]}, 2)
    assert names == ("dose", "age")
    np.testing.assert_array_equal(rows, [[1, 1, 3], [1, 2, 4]])
    assert design_matrix([5.0, 6.0], 2)[1].tolist() == [[1, 5], [1, 6]]
    assert design_matrix(np.zeros((3, 2)), None)[0] == ("x0", "x1")
    assert design_matrix(None, 2)[1].tolist() == [[1], [1]]


def test_names_and_priors() -> None:
    assert labels(None, 2) == ("study 1", "study 2")
    assert normal_prior("p", None, 2).tolist() == [[0, np.inf], [0, np.inf]]
    assert normal_prior("p", (1.0, [2.0, 3.0]), 2).tolist() == [[1, 2], [1, 3]]
