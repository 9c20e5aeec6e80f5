"""A KV endpoint in a process of its own, to be killed; it stops in one phase of a transfer and says so."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from helpers.kv_rig import Receiver, Sender, eventually

PHASES = ("waiting", "middle", "end")
BLOCKS = [1, 2, 3, 4, 5, 6]
TARGETS = [21, 22, 23, 24, 25, 26]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["helpers.kv_rig"])


def hold_end(sender: Sender) -> tuple[threading.Event, threading.Event]:
    """The sender's last frame waits for the second event; the first says that all others have gone."""
    reached, go = threading.Event(), threading.Event()
    real = sender.server._producer.end

    def end(*arguments: Any) -> bytes:
        reached.set()
        go.wait()
        return real(*arguments)

    sender.server._producer.end = end  # type: ignore[method-assign]
    return reached, go


def _send(pipe: Connection, transport: str, phase: str) -> None:
    sender = Sender(kinds=(transport,))
    reached, _ = hold_end(sender)
    transfer = sender.open("t", BLOCKS)
    pipe.send(sender.server.address)
    eventually(lambda: bool(transfer.streaming), "it is asked for")
    if phase != "waiting":
        sender.compute(transfer, until=2 if phase == "middle" else None)
    if phase == "end":
        reached.wait()
    pipe.send("reached")
    threading.Event().wait()


def _receive(pipe: Connection, transport: str, phase: str) -> None:
    receiver = Receiver(transport=transport)
    fetch = receiver.fetch("t", TARGETS, pipe.recv())
    if phase != "waiting":
        every = 2 if phase == "middle" else len(BLOCKS)
        eventually(lambda: fetch.landed == [every] * 4, "frames land")
        pipe.send("reached")
    threading.Event().wait()


@contextmanager
def child(end: str, transport: str, phase: str) -> Iterator[tuple[Any, Connection]]:
    """Start a `sender` or a `receiver` and give it and a pipe to it; it is killed afterwards if it still lives."""
    ours, theirs = _CONTEXT.Pipe()
    target = {"sender": _send, "receiver": _receive}[end]
    process = _CONTEXT.Process(target=target, args=(theirs, transport, phase), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
