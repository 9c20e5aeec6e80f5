"""What the launcher tells a worker; imports nothing, so that the launcher need not load vLLM."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerSpec:
    """What one worker needs to know to start.

    Attributes:
        pool: name of its pool.
        worker_id: unique in the cluster.
        cores: CPU cores to run on; empty leaves that to the system.
        host: address to listen on and to register.
    """

    pool: str
    worker_id: str
    cores: tuple[int, ...] = ()
    host: str = "127.0.0.1"
