"""`kv.transport: nixl`: vLLM's own NixlConnector carries the KV instead of ours.

Its protocol is another: the prefill worker says at its end where the blocks are, and only then can the decode worker
be asked, who reads them and tells the other that it has. So nothing is shipped while prefill runs. Everything else
stays: routing, replay of the first token, and recomputing what was lost.
"""

import importlib.util
import os
import socket
from typing import Any

from vllm.config import KVTransferConfig
from vllm.platforms import current_platform

from joinwise.cluster.errors import ConfigError

ASK: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""A prefill part's `kv_transfer_params`; its last output brings those of the decode part."""


def transfer_config(lease_s: float) -> KVTransferConfig:
    """What vLLM must know to use it.

    Args:
        lease_s: seconds for which a prefill worker keeps blocks that nobody reads.

    Raises:
        ConfigError: NIXL is not installed here.
    """
    if not any(importlib.util.find_spec(name) for name in ("nixl", "rixl")):
        raise ConfigError("kv.transport: nixl needs NIXL where workers run: pip install nixl")
    return KVTransferConfig(
        kv_connector="NixlConnector",
        kv_role="kv_both",
        kv_buffer_device=current_platform.device_type,
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"kv_lease_duration": max(1, round(lease_s))},
    )


def listen_on(host: str) -> None:
    """Where this process tells its peers about its memory, from when its engine is built; it shows no token."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        port = free.getsockname()[1]
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = host
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
