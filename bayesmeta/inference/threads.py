"""How many threads work is worth: small pieces cost more to share than to do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

SMALL = 2**17
"""Numbers evaluated at once up to which one thread is as fast as two, at half the processor time."""


class _Small(threading.local):
    """Blocks of small work that run now: `depth` in this thread, `blocks` in all, entered when torch had `outside`."""

    depth = 0
    lock = threading.Lock()
    blocks = 0
    outside = 0


_SMALL = _Small()


@contextlib.contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """Uses one thread while no more than `SMALL` numbers are evaluated at once, torch's number of threads otherwise.

    What torch is told in one thread holds for threads to come as well: a block may find the number that another left.
    """
    if elements > SMALL:
        yield
        return
    with _Small.lock:
        if not _Small.blocks:
            _Small.outside = torch.get_num_threads()
        _Small.blocks += 1
        _SMALL.depth += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _Small.lock:
            _Small.blocks -= 1
            _SMALL.depth -= 1
            if not _SMALL.depth:
                torch.set_num_threads(_Small.outside)
