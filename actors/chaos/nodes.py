"""The Ray of the cluster that is broken: a head, which computes nothing, and nodes beside it, each with its raylet.

Its control store keeps what it knows on disk (Ray's fault tolerance of the GCS), as where Ray is run for others: it may
die and come back.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster

from joinwise.cluster.errors import InternalError

_STORE_BYTES = 80 << 20  # the least that Ray takes
_DIES_S = 5.0
_STARTS, _ANSWERS_S, _LOOK_S = 3, 10.0, 0.05


class Nodes:
    """They run while the context is open.

    Args:
        count: of nodes beside the head.
        cpus: logical CPUs that each of those offers.
        folder: for what the control store keeps.

    Errors of their start are those of `add`. Engines run at the niceness that Ray gives them, 15: what keeps the nodes
    alive comes first on a machine that is too small for all of them.
    """

    def __init__(self, count: int, cpus: int, folder: Path) -> None:
        self._count, self._cpus, self._folder = count, cpus, folder
        self._control = ("", 0)
        self._ray = Cluster(shutdown_at_exit=False)  # nodes are added by other threads than the main one

    def __enter__(self) -> Self:
        kept = self._folder / "gcs"
        kept.mkdir()
        storage = {"gcs_storage": "rocksdb", "gcs_storage_path": str(kept)}
        try:
            self._add(num_cpus=0, include_dashboard=False, _system_config=storage)
            for _ in range(self._count):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    @property
    def address(self) -> str:
        """host:port of the control store."""
        return str(self._ray.address)

    def add(self) -> None:
        """Start one more node.

        Raises:
            InternalError: Ray could not.
        """
        self._add(num_cpus=self._cpus)

    def _add(self, **arguments: Any) -> None:
        try:
            self._ray.add_node(object_store_memory=_STORE_BYTES, **arguments)
        except Exception as error:  # Ray says no more than that
            raise InternalError(f"a node of Ray has not started: {error}") from error

    @property
    def processes(self) -> Mapping[str, psutil.Process]:
        """The control store and all raylets, by name."""
        nodes: list[Node] = self._ray.list_all_nodes()
        found = {"gcs_server": _process(nodes[0], "gcs_server")}
        return found | {f"raylet {place}": _process(node, "raylet") for place, node in enumerate(nodes)}

    def lose_control(self) -> int:
        """Kill the control store; returns its process id."""
        host, _, port = self.address.rpartition(":")
        self._control = host, int(port)
        pid: int = _process(self._ray.head_node, "gcs_server").pid
        self._ray.head_node.kill_gcs_server()
        return pid

    def regain_control(self) -> None:
        """Start it again, with what it knew, and see that it answers.

        Raises:
            InternalError: it does not, however often it is started.
        """
        for _ in range(_STARTS):
            self._ray.head_node.start_gcs_server()
            deadline = time.monotonic() + _ANSWERS_S
            while time.monotonic() < deadline:
                with suppress(OSError), socket.create_connection(self._control, timeout=1):
                    return
                time.sleep(_LOOK_S)
            self._ray.head_node.kill_gcs_server(check_alive=False)
        raise InternalError(f"Ray's control store does not answer after {_STARTS} starts")

    def lose(self, raylet: psutil.Process) -> None:
        """Kill a node's raylet, and what is left of the node when that is gone.

        Raises:
            InternalError: it is none of a node beside the head.
        """
        for node in self._ray.worker_nodes:
            if _process(node, "raylet").pid == raylet.pid:
                raylet.kill()
                raylet.wait(_DIES_S)
                self._ray.remove_node(node, allow_graceful=False)
                return
        raise InternalError(f"process {raylet.pid} is no raylet beside the head's")


def _process(node: Node, kind: Literal["gcs_server", "raylet"]) -> psutil.Process:
    (found,) = node.all_processes[kind]
    return psutil.Process(found.process.pid)
