"""Transfers over a link of 1 Gbit/s that loses every twentieth packet: late, and right."""

from __future__ import annotations

import multiprocessing

import pytest
from helpers.kv_lossy import LOSS, transfer_over_lossy_link

from joinwise.actors.bench.link import refused

_REFUSED = refused(loss=LOSS)


@pytest.mark.skipif(bool(_REFUSED), reason=_REFUSED or "links can be made")
@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_a_lossy_link_costs_time_only(transport: str) -> None:
    context = multiprocessing.get_context("spawn")  # threads that run already would stay outside the link
    ours, theirs = context.Pipe()
    process = context.Process(target=transfer_over_lossy_link, args=(theirs, transport))
    process.start()
    theirs.close()
    process.join(100)
    assert process.exitcode == 0
    assert ours.recv() > 0, "packets were lost"
