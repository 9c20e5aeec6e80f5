"""A plain vLLM engine in this process, with vLLM's own HTTP front end and joinwise's gRPC service over it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class PlainVllm:
    """What a test needs of a running engine."""

    engine: Any
    app: Any
    http: httpx.AsyncClient


@asynccontextmanager
async def plain_vllm(model: str, name: str, *extra: str) -> AsyncIterator[PlainVllm]:
    """Start an engine and vLLM's front end over it.

    Args:
        model: local folder.
        name: the name clients ask for.
        extra: further arguments of vLLM's server.
    """
    for key, value in ENGINE.items():
        os.environ.setdefault(key, value)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = ["--model", model, "--served-model-name", name, "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "1024", "--kv-cache-memory-bytes", "100000000", "--max-num-seqs", "8"]
    arguments += ["--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes", *extra]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    try:
        app = build_app(args, ("generate",), engine.model_config)
        await init_app_state(engine, app.state, args, ("generate",))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=120) as http:
            yield PlainVllm(engine, app, http)
    finally:
        engine.shutdown()
