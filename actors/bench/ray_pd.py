"""The named baseline of split prefill: the prefill/decode application of `ray.serve.llm`, over vLLM's NixlConnector.

Its two engines and joinwise's two are the same, on one core each; a plain vLLM server with one such engine says what an
answer takes without any of it. What a system *adds* is its time to the end of a short answer less that. The systems
take turns; the Ray application's engines, whose threads poll, stand still meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.nixl_pair import NixlPair
from joinwise.actors.bench.plain import plain_vllm
from joinwise.actors.bench.serve import MODEL, Answer, ask, question
from joinwise.actors.bench.server import free_port, server
from joinwise.actors.models import resolve_model
from joinwise.cluster.config import JoinwiseConfig

_NEEDED = ("nixl", "pyarrow")
_OURS, _RAY, _PLAIN = "joinwise split", "ray.serve.llm P/D", "one plain engine"
_MAX_MODEL_LEN = 1024
_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 200_000_000, "block_size": 32, "max_num_seqs": 4}
_PROMPT, _TOKENS, _WARM = 256, 8, 4
_START_S = 300.0

Say = Callable[[str], None]


def missing() -> list[str]:
    """What keeps the application from running here."""
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return [f"ray.serve.llm's P/D application: pip install {' '.join(absent)}"] if absent else []


def run(requests: int, rounds: int, say: Say) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Run the comparison.

    Args:
        requests: of each system in each round, one after another.
        rounds: for the medians.
        say: is told what happens.

    Returns:
        `ray_pd_added_latency_ratio`, how often joinwise's added time goes into that of the Ray application, with both
        in milliseconds; and a row for each system.
    """
    model, cores = resolve_model(MODEL, progress=say), sorted(os.sched_getaffinity(0))[:2]
    engine = {"dtype": "float32", "max_model_len": _MAX_MODEL_LEN, **_ENGINE}
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="joinwise-bench-") as name:
        folder = Path(name)
        say(f"starting {_OURS}")
        urls = {_OURS: stack.enter_context(local_cluster(_cluster(), folder))["addresses"]["http"]}
        say(f"starting {_PLAIN}")
        plain = plain_vllm(str(model.path), MODEL, cores[:1], engine, folder / "plain.log")
        urls[_PLAIN] = stack.enter_context(plain)
        say(f"starting {_RAY}")
        app = stack.enter_context(ray_pd(str(model.path), cores, engine, folder))
        urls[_RAY] = app.decode
        answers = asyncio.run(_measure(urls, app, requests, rounds, say))
    rows = [_row(system, found) for system, found in answers.items()]
    whole = {row["system"]: row["whole_ms"] for row in rows}
    ours, theirs = (whole[system] - whole[_PLAIN] for system in (_OURS, _RAY))
    figures = {"ray_pd_added_latency_ratio": theirs / ours, "added_ms_split": ours, "added_ms_ray_pd": theirs}
    return {name: round(value, 2) for name, value in figures.items()}, rows


@contextmanager
def ray_pd(model_path: str, cores: Sequence[int], engine: dict[str, Any], folder: Path) -> Iterator[NixlPair]:
    """Run the application in a Ray of its own; one URL answers for both engines.

    Args:
        model_path: local folder.
        cores: one for each engine.
        engine: engine arguments by name, as in joinwise.yaml.
        folder: for its configuration and log.
    """
    port, file = free_port(), folder / "ray-pd.yaml"
    file.write_text(yaml.safe_dump(_application(model_path, cores, engine, port)))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local", str(file)]
    variables = os.environ | {
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 16}),  # its actors ask for more cores than they use
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    before = {process.pid for process in psutil.process_iter()}
    with server("ray.serve.llm", command, port, folder / "ray-pd.log", variables, path="/v1/models") as url:
        body = question([1000] * _PROMPT, _TOKENS) | {"stream": False}
        httpx.post(
            f"{url}/v1/completions", json=body, timeout=_START_S
        ).raise_for_status()  # its models are listed before
        engines = [each for each in psutil.process_iter(["name"]) if each.pid not in before and _computes(each)]
        pair = NixlPair(url, url, engines)
        try:
            yield pair
        finally:
            pair.resume()  # what is stopped cannot end


def _computes(process: psutil.Process) -> bool:
    """Whether it is vLLM's, by the name that vLLM gives to engines and workers."""
    return str(process.info["name"] or "").startswith("VLLM")


def _application(model_path: str, cores: Sequence[int], engine: dict[str, Any], port: int) -> dict[str, Any]:
    """Serve's configuration: what its documentation gives for NIXL, with one engine for each phase."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}

    def phase(core: int) -> dict[str, Any]:
        return {
            "model_loading_config": {"model_id": MODEL, "model_source": model_path},
            "engine_kwargs": {**engine, "kv_transfer_config": transfer},
            "placement_group_config": {"bundles": [{"CPU": 1}]},
            "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
            "runtime_env": {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": str(core)}},
        }

    arguments = {"prefill_config": phase(cores[0]), "decode_config": phase(cores[-1])}
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "pd",
                "route_prefix": "/",
                "import_path": "ray.serve.llm:build_pd_openai_app",
                "args": arguments,
            }
        ],
    }


async def _measure(
    urls: dict[str, str], app: NixlPair, requests: int, rounds: int, say: Say
) -> dict[str, list[Answer]]:
    """Answers of each system, the same prompts to all."""
    answers: dict[str, list[Answer]] = {system: [] for system in urls}
    rng = random.Random(0)  # noqa: S311 - reproducible, not secret
    clients = {system: httpx.AsyncClient(base_url=url, timeout=120) for system, url in urls.items()}
    try:
        for number in range(-1, rounds):
            count = requests if number >= 0 else _WARM
            prompts = [[rng.randrange(1000, 40_000) for _ in range(_PROMPT)] for _ in range(count)]
            for system in list(urls) if number % 2 else reversed(urls):
                with app.awake() if system == _RAY else nullcontext():
                    found = [await ask(clients[system], prompt, _TOKENS) for prompt in prompts]
                answers[system] += found if number >= 0 else []
            _same(answers)
            say(f"round {number + 1} of {rounds}")
    finally:
        for client in clients.values():
            await client.aclose()
    return answers


def _same(answers: dict[str, list[Answer]]) -> None:
    """Correctness before time.

    Raises:
        RuntimeError: two systems have answered differently.
    """
    for ours, plain, ray in zip(answers[_OURS], answers[_PLAIN], answers[_RAY], strict=True):
        if not ours.token_ids == plain.token_ids == ray.token_ids:
            raise RuntimeError(f"different tokens: {ours.token_ids}, {plain.token_ids}, {ray.token_ids}")


def _row(system: str, answers: Sequence[Answer]) -> dict[str, Any]:
    first, whole = ([1000 * answer.times[at] for answer in answers] for at in (0, -1))
    medians = {"ttft_ms": statistics.median(first), "whole_ms": statistics.median(whole)}
    return {"system": system, **{name: round(value, 1) for name, value in medians.items()}}


def _cluster() -> JoinwiseConfig:
    pools = [
        {"name": role, "model": MODEL, "role": role, "device": "cpu", "threads": 1, "engine": dict(_ENGINE)}
        for role in ("prefill", "decode")
    ]
    return JoinwiseConfig.model_validate(
        {
            "cluster": "bench-split",
            "models": [{"name": MODEL, "model": MODEL, "dtype": "float32", "max_model_len": _MAX_MODEL_LEN}],
            "pools": pools,
            "router": {"split": "always", "moves": False},
            "gateway": {"http_port": 0, "grpc_port": 0, "drain_s": 2},
        }
    )
