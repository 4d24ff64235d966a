"""What options of methods and guides must be."""

from __future__ import annotations


def check_lengths(name: str, *, least: int = 1, **lengths: int) -> None:
    """Refuses options that are no whole numbers of at least `least`.

    Args:
        name: Of the method or guide.
        least: The smallest number that is allowed.
        **lengths: Options by name.

    Raises:
        ValueError: Names the option.
    """
    for option, value in lengths.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: {option} must be a whole number of at least {least}, got {value!r}")
