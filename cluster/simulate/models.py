"""What a simulation may assume of engines and links: as vLLM and joinwise are, or as SplitwiseSim has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from joinwise.cluster.simulate.engine import Engine, World
from joinwise.cluster.simulate.engine_splitwise import SplitwiseEngine
from joinwise.cluster.simulate.engine_vllm import VllmEngine
from joinwise.cluster.simulate.link import Links
from joinwise.cluster.simulate.profile import Kind

EngineType = Callable[[str, Kind, str, World], Engine]


@dataclass(frozen=True)
class Model:
    """What a simulation assumes of engines and links.

    Attributes:
        name: "vllm" or "splitwise".
        engine: makes an engine.
        links: makes the network.
        tbt_over_all: time between tokens is over all tokens, as SplitwiseSim has it, not over the gaps between them.
        policy: the usual one.
        retry_s: a cache that finds no room where it is to go is offered again after so long; None: when there is room.
    """

    name: str
    engine: EngineType
    links: Callable[[], Links]
    tbt_over_all: bool
    policy: str
    retry_s: float | None = None


MODELS = {
    "vllm": Model("vllm", VllmEngine, Links, tbt_over_all=False, policy="auto"),
    "splitwise": Model(
        "splitwise",
        SplitwiseEngine,
        lambda: Links(bytes_s=200 * 1024**3, contended=False, overlap=False),
        tbt_over_all=True,
        policy="splitwise",
        retry_s=1.0,
    ),
}
