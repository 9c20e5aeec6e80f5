"""The kinds of lanes by name, and the two parts of each one's handshake."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from joinwise.actors.kv.lanes import shm, tcp
from joinwise.actors.kv.lanes.lane import LaneOptions
from joinwise.actors.kv.lanes.wire import Wire

KINDS = ("tcp", "shm", "nccl")


@dataclass(frozen=True)
class Kind:
    """How the two ends of a lane are made; see `tcp.connect` and `tcp.accept`."""

    connect: Callable[[Wire, dict[str, Any], LaneOptions], tcp.TcpReceive]
    accept: Callable[[Wire, dict[str, Any], LaneOptions], tcp.TcpSend]


def load(kind: str) -> Kind:
    """The kind of this name, one of `KINDS`. May take seconds: call it before a handshake begins."""
    if kind == "nccl":
        from joinwise.actors.kv.lanes import nccl  # the others need no torch

        return Kind(nccl.connect, nccl.accept)
    return {"tcp": Kind(tcp.connect, tcp.accept), "shm": Kind(shm.connect, shm.accept)}[kind]
