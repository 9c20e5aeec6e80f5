"""One thread for torch while tests run; make a fixture of it, for whatever scope."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def single_thread() -> Iterator[None]:
    """Several would wait for each other where other tests run beside, or where there is too little to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
