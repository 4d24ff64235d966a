"""How many threads work is worth: small pieces cost more to share than to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

SMALL = 2**17
"""Numbers evaluated at once up to which one thread is as fast as two, at half the processor time."""


@contextlib.contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """Uses one thread while no more than `SMALL` numbers are evaluated at once, torch's number of threads otherwise."""
    before = torch.get_num_threads()
    if elements <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
