from __future__ import annotations

import threading

import pytest
import torch

from bayesmeta.inference.threads import SMALL, threads_for


@pytest.mark.parametrize(("elements", "threads"), [(SMALL, 1), (SMALL + 1, 3)])
def test_small_work_has_one_thread_and_torch_its_number_again(elements: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads_for(elements):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), threads_for(elements):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_overlapping_blocks_of_several_threads_give_the_number_back() -> None:
    before, inside, leave, seen = torch.get_num_threads(), threading.Event(), threading.Event(), []

    def other() -> None:
        with threads_for(1), threads_for(1):
            inside.set()
            leave.wait(10)
        seen.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        running = threading.Thread(target=other)
        with threads_for(1):
            running.start()
            inside.wait(10)
            with threads_for(1):
                pass
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        leave.set()
        running.join()
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [3, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
