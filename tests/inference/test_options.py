"""Options that are counted."""

from __future__ import annotations

import pytest

from bayesmeta.inference.options import check_lengths


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "2", None])
def test_what_is_no_number_of_steps_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="Method: steps must be a whole number of at least 1, got"):
        check_lengths("Method", draws=4, steps=value)  # type: ignore[arg-type]


def test_the_least_number_is_allowed_and_no_smaller_one() -> None:
    check_lengths("Method", steps=1)
    check_lengths("Method", least=2, particles=2)
    with pytest.raises(ValueError, match="Method: particles must be a whole number of at least 2, got 1"):
        check_lengths("Method", least=2, particles=1)
