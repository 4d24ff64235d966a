from __future__ import annotations

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
