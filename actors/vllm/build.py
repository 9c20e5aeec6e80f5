"""Builds vLLM's configuration for a worker or a gateway from joinwise's."""

from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from joinwise.actors.vllm import (
    connector,
    linears,  # noqa: F401 # engine arguments may name what it registers
)
from joinwise.actors.vllm.kv_events import events_config
from joinwise.actors.vllm.proposer import speculation
from joinwise.cluster.errors import ConfigError

REPLAY = "joinwise.actors.vllm.replay:ReplayLogitsProcessor"
REPLAY_V2 = "joinwise.actors.vllm.replay_v2:ReplayLogitsProcessorV2"


def worker_config(
    model_path: str,
    engine: dict[str, Any],
    *,
    kv_events: bool = False,
    drafts: int = 0,
    transfer: KVTransferConfig | None = None,
) -> VllmConfig:
    """Configuration of an engine that can send and receive KV, and replay; or, instead of that, verify drafts.

    Args:
        model_path: local folder of the model.
        engine: vLLM engine arguments by name, from the pool's configuration.
        kv_events: tell of every block that its cache gains or loses (`kv_events.report_blocks`).
        drafts: ids a sequence and step that a draft actor is asked for (`proposer`); 0 for an engine without.
        transfer: a connector of vLLM's that ships KV (`nixl`); ours where it is None.

    Raises:
        ConfigError: an argument that vLLM does not know, or a value that it refuses.
    """
    ours: dict[str, Any] = {
        "kv_transfer_config": transfer
        or KVTransferConfig(
            kv_connector=connector.NAME,
            kv_connector_module_path=connector.MODULE,
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
    }
    if drafts:  # vLLM takes no logits processor beside speculation: `plain` does without replay
        ours["speculative_config"] = speculation(drafts)
        ours["per_request_spec_decode_metrics"] = "summary"  # for ledgers
    else:
        ours["logits_processors"] = [REPLAY]
    defaults: dict[str, Any] = {
        # A step must be over before the next is scheduled: tokens to replay and released requests
        # enter between two steps.
        "async_scheduling": False,
        "enable_prefix_caching": True,
        # Equal priorities are served in the order in which they came.
        "scheduling_policy": "priority",
    }
    if kv_events:
        ours["kv_events_config"] = events_config()
    config = _config(model_path, {**defaults, **engine, **ours})
    if config.use_v2_model_runner and not drafts:
        config.model_config.logits_processors = [REPLAY_V2]
    return config


def gateway_config(model_path: str, engine: dict[str, Any], served_names: list[str]) -> VllmConfig:
    """Configuration of a front end: the same model and limits, no engine behind it here."""
    return _config(model_path, {**engine, "async_scheduling": False, "served_model_name": served_names})


def _config(model_path: str, arguments: dict[str, Any]) -> VllmConfig:
    try:
        return AsyncEngineArgs(model=model_path, **arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses the engine arguments: {error}") from error
