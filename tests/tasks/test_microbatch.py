"""One thread: for the block alone, also when the block fails. Fixed batches are tested with the networks."""

from __future__ import annotations

import pytest
import torch

from tasks.microbatch import one_thread


def test_one_thread_lasts_as_long_as_the_block() -> None:
    with one_thread():
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            _ = 1 / 0
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
