"""NIXL's two processes: agents over memory of the same size, the receiver reads the same blocks.

What is timed is what vLLM's NixlConnector does for each request: it makes a transfer of descriptors that
were prepared at the handshake, one for each block and layer, posts it and asks until it is done.
"""

import importlib.util
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joinwise.actors.bench.kv_ends import End, Shape

INSTALL = "pip install --no-deps nixl nixl-cu12"
_LOG = "joinwise-bench-ucx.%p.log"


def missing() -> str:
    """Why NIXL cannot be measured here; empty when it can."""
    if importlib.util.find_spec("nixl") is None:
        return f"nixl is not installed: {INSTALL}"
    return ""


def environment(tls: str, folder: Path) -> dict[str, str]:
    """Variables of both processes.

    Args:
        tls: UCX_TLS; empty leaves the choice to UCX.
        folder: where UCX writes down what it has chosen.
    """
    said = {"NIXL_LOG_LEVEL": "ERROR", "UCX_PROTO_INFO": "y", "UCX_LOG_FILE": str(folder / _LOG)}
    return {**said, "UCX_TLS": tls} if tls else said


def chosen(folder: Path) -> str:
    """The transports, and their devices, by which UCX says it has read."""
    found: set[str] = set()
    for file in folder.glob(_LOG.replace("%p", "*")):
        for table in re.findall(r"ucp_get.*?(?=ucp_|\Z)", file.read_text(errors="replace"), re.DOTALL):
            found.update(re.findall(r"\| +(\w+/[\w.:-]+) +\|", table))
    return ", ".join(sorted(found))


class Agent(End):
    """Either end.

    Args:
        shape: of the cache.
        name: of the agent.
        progress: let a thread answer its peer, as the sender must.
    """

    def __init__(self, shape: Shape, name: str, progress: bool) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found, unused-ignore]

        super().__init__(shape, seed=1 if progress else 2)
        self._agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=progress, backends=["UCX"]))
        self._registered = self._agent.register_memory(self.memory)
        self._sides: tuple[Any, Any] = (None, None)

    def describe(self) -> tuple[bytes, int]:
        """What the other end needs: metadata, and the cache's address."""
        return self._agent.get_agent_metadata(), self.memory.data_ptr()

    def connect(self, metadata: bytes, address: int) -> None:
        """Prepare descriptors of every block and layer at both ends."""
        peer = self._agent.add_remote_agent(metadata)
        self._sides = (
            self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._descriptors(self.memory.data_ptr()), "DRAM"),
            self._agent.prep_xfer_dlist(peer, self._descriptors(address), "DRAM"),
        )

    def read(self, block_ids: Sequence[int]) -> float:
        """Read the same blocks of all layers as are written; seconds."""
        count = self.shape.num_blocks
        begin = time.perf_counter()
        indices = [layer * count + block for layer in range(self.shape.layers) for block in block_ids]
        local, remote = self._sides
        handle = self._agent.make_prepped_xfer("READ", local, indices, remote, indices)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        seconds = time.perf_counter() - begin
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL: {state}")
        return seconds

    def _descriptors(self, address: int) -> list[tuple[int, int, int]]:
        size = self.shape.layer_block_bytes
        return [(address + index * size, size, 0) for index in range(self.shape.layers * self.shape.num_blocks)]
