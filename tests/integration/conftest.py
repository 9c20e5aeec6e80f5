"""The cluster that integration tests share, and the plain engine it is compared with: one start for the whole run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from helpers.cluster import ENGINE, RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle
from helpers.plain_vllm import PlainServer, plain_server
from helpers.ray_head import RayHead, ray_head

# The cluster prefills longer prompts in chunks; the plain engine computes any prompt at once.
CHUNK_TOKENS = 512


def _shared_config() -> dict[str, Any]:
    config = cluster_config("shared")
    for pool in config["pools"]:
        pool["engine"]["max_num_batched_tokens"] = CHUNK_TOKENS
    # /inference/v1/generate takes vLLM's whole SamplingParams: test_exactness walks every field of it.
    config["gateway"]["vllm_args"] = {"enable_scale_out": True}
    return config


@pytest.fixture(scope="session")
def shared_cluster(small_model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A float32 cluster of one prefill and one decode engine."""
    with running_cluster(_shared_config(), tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
async def cluster(shared_cluster: RunningCluster) -> AsyncIterator[RunningCluster]:
    """The shared cluster; it must be idle after the test."""
    yield shared_cluster
    await assert_idle(shared_cluster)


@pytest.fixture(scope="session")
def baseline(small_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainServer]:
    """One plain vLLM engine with the cluster's engine arguments behind vLLM's own server."""
    engine = {**ENGINE, "max_model_len": 2048, "max_num_batched_tokens": 2048}
    front_end = {"enable_scale_out": True, "enable_prompt_tokens_details": True, "enable_request_id_headers": True}
    tools = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    folder = tmp_path_factory.mktemp("plain")
    with plain_server(str(small_model.path), folder, **engine, **front_end, **tools) as server:
        yield server


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A Ray head with jobs and Serve."""
    with ray_head(tmp_path_factory.mktemp("ray")) as head:
        yield head
