"""Both ends of KV transfers behind a lossy link, in a process of their own."""

from __future__ import annotations

import re
import subprocess
from multiprocessing.connection import Connection

from helpers.kv_rig import Receiver, Sender, eventually

from joinwise.actors.bench.link import link

LOSS = 0.05
_BLOCKS = 16_000
_TRANSFERS = 3


def transfer_over_lossy_link(pipe: Connection, transport: str) -> None:
    """Three transfers at once, each compared byte by byte; sends how many packets got lost."""
    with link("1gbit", loss=LOSS):
        sender = Sender(_BLOCKS, kinds=(transport,), frame_bytes=64 << 10)
        receiver = Receiver(_BLOCKS, transport=transport)
        fetches = []
        for index in range(_TRANSFERS):
            ids = range(index, _BLOCKS, _TRANSFERS)
            transfer = sender.open(f"t{index}", ids)
            fetches.append((receiver.fetch(f"t{index}", ids[::-1], sender.server.address), transfer, ids))
        for _, transfer, _ in fetches:
            sender.compute(transfer)
        for fetch, transfer, ids in fetches:
            assert fetch.join(60) is None, fetch.error
            sender.finish(transfer)
            receiver.expect(sender.content(transfer), ids[::-1])
        receiver.assert_cache()
        receiver.assert_idle()
        eventually(lambda: not sender.server.open_streams, "streams end")
        sender.assert_idle()
        rules = subprocess.run(["nft", "list", "table", "inet", "lossy"], capture_output=True, text=True, check=True)
        receiver.stop()
        sender.stop()
    pipe.send(sum(int(count) for count in re.findall(r"packets (\d+)", rules.stdout)))
