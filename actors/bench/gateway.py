"""`joinwise bench gateway`: what the way to an engine costs, when the engine costs nothing.

The same engine with a model that is never run (`stub_executor`) stands behind joinwise's gateway (gRPC frames), behind
vLLM's own server (its client of several processes, over ZMQ) and, two of those servers, behind the routers
`vllm-router` and `smg` where they are installed. The systems take turns. CPU is counted for the processes between
client and engine: a gateway, a server without its engine, a router (its servers apart); Redis is reported by itself.
What each uses while nobody asks (`idle ms/s`) is measured first, and taken off: it is no request's.
"""

import asyncio
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.plain import plain_vllm
from joinwise.actors.bench.serve import MODEL
from joinwise.actors.bench.server import free_port, server
from joinwise.actors.models import resolve_model
from joinwise.cluster.config import JoinwiseConfig

ROUTERS = ("vllm-router", "smg")
_STUB = "joinwise.actors.bench.stub_executor.StubExecutor"
_ENGINE = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 200_000_000,
    "block_size": 32,
    "max_num_seqs": 16,
    "distributed_executor_backend": _STUB,
}
_MAX_MODEL_LEN = 1024
_WORDS = 60
_IDLE_S = 10.0
_TOKENS = 64

Say = Callable[[str], None]


@dataclass
class System:
    """One way to the engine.

    Attributes:
        url: of its front.
        processes: those whose CPU counts, by what they are.
        idle: seconds of CPU that each uses in a second without requests.
    """

    name: str
    url: str
    processes: dict[str, psutil.Process]
    idle: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def cpu(self) -> dict[str, float]:
        """Seconds of each, user and system."""
        return {name: sum(process.cpu_times()[:2]) for name, process in self.processes.items()}


def run(requests: int, at_once: int, rounds: int, say: Say) -> tuple[dict[str, float], list[dict[str, Any]], list[str]]:
    """Run the benchmark.

    Args:
        requests: streams of each system in each round.
        at_once: of them.
        rounds: for the medians.
        say: is told what happens.

    Returns:
        Figures, one row for each system, and what was not measured and why.
    """
    missing = [f"{name} is not on the PATH: pip install {name}" for name in ROUTERS if shutil.which(name) is None]
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="joinwise-bench-") as folder:
        systems = _start(stack, Path(folder), say)
        asyncio.run(_measure(systems, requests, at_once, rounds, say))
    rows = [_row(system) for system in systems]
    return _figures(systems, rows), rows, missing


def _start(stack: ExitStack, folder: Path, say: Say) -> list[System]:
    say("starting joinwise with a stub engine")
    facts = stack.enter_context(local_cluster(_cluster(), folder))
    url = facts["addresses"]["http"]
    ports = {"gateway": _port(url), "redis": _port(facts["redis_url"])}
    systems = [System("joinwise", url, {name: _listener(port) for name, port in ports.items()})]
    model = resolve_model(MODEL, progress=say)
    cores = sorted(os.sched_getaffinity(0))
    engine = {"max_model_len": _MAX_MODEL_LEN, "no_async_scheduling": True, **_ENGINE}
    routers = [name for name in ROUTERS if shutil.which(name)]
    servers: list[str] = []
    for number in range(2 if routers else 1):
        say("starting vLLM's own server with a stub engine")
        log = folder / f"vllm-{number}.log"
        core = cores[number % len(cores)]
        servers.append(stack.enter_context(plain_vllm(str(model.path), MODEL, [core], engine, log)))
    systems.append(System("vllm", servers[0], {"server": _listener(_port(servers[0]))}))
    for name in routers:
        say(f"starting {name}")
        url = stack.enter_context(_router(name, servers, folder / f"{name}.log"))
        behind = {f"server {number}": _listener(_port(each)) for number, each in enumerate(servers)}
        systems.append(System(name, url, {"router": _listener(_port(url)), **behind}))
    return systems


def _router(name: str, servers: Sequence[str], log: Path) -> AbstractContextManager[str]:
    port = free_port()
    command = [name, *(["launch"] if name == "smg" else []), "--worker-urls", *servers, "--policy", "round_robin"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return server(name, command, port, log)


async def _measure(systems: Sequence[System], requests: int, at_once: int, rounds: int, say: Say) -> None:
    say(f"nobody asks for {_IDLE_S:g} s")
    before = [system.cpu() for system in systems]
    await asyncio.sleep(_IDLE_S)
    for system, then in zip(systems, before, strict=True):
        system.idle = {name: (after - then[name]) / _IDLE_S for name, after in system.cpu().items()}
    for number in range(-1, rounds):  # the first round warms up
        for system in systems if number % 2 else reversed(systems):
            async with httpx.AsyncClient(base_url=system.url, timeout=120) as client:
                long = await _load(system, client, requests, at_once, _TOKENS)
                short = await _load(system, client, requests, at_once, 1)
            if number >= 0:
                system.rounds.append(_round(long, short, requests))
        say(f"round {number + 1} of {rounds}")


async def _load(system: System, client: httpx.AsyncClient, requests: int, at_once: int, tokens: int) -> dict[str, Any]:
    """Stream that many answers; CPU seconds of each process for them, and each answer's seconds to its first token."""
    limit = asyncio.Semaphore(at_once)
    firsts: list[float] = []

    async def one(number: int) -> None:
        async with limit:
            firsts.append(await _stream(client, number, tokens))

    before, begin = system.cpu(), time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(requests)))
    used, seconds = system.cpu(), time.perf_counter() - begin
    return {"cpu": {name: used[name] - before[name] - system.idle[name] * seconds for name in used}, "ttft": firsts}


async def _stream(client: httpx.AsyncClient, number: int, tokens: int) -> float:
    prompt = f"{number} " + "one more word " * (_WORDS // 3)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    begin, first, chunks = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first, chunks = first or time.perf_counter() - begin, chunks + 1
    if chunks < tokens / 2:
        raise RuntimeError(f"an answer of {tokens} tokens came in {chunks} chunks")
    return first


def _round(long: dict[str, Any], short: dict[str, Any], requests: int) -> dict[str, float]:
    """Microseconds of CPU by process: a request of one token, and each further token."""
    found = {"ttft_ms": 1000 * statistics.median(short["ttft"])}
    for name, seconds in short["cpu"].items():
        token = (long["cpu"][name] - seconds) / (_TOKENS - 1)
        found[f"{name} us/request"] = 1e6 * (seconds - token) / requests
        found[f"{name} us/token"] = 1e6 * token / requests
        found[f"{name} us"] = 1e6 * long["cpu"][name] / requests
    return found


def _row(system: System) -> dict[str, Any]:
    names = system.rounds[0]
    medians = {name: round(statistics.median(each[name] for each in system.rounds), 1) for name in names}
    idle = {f"{name} idle ms/s": round(1000 * each, 1) for name, each in system.idle.items()}
    return {"system": system.name, **medians, **idle}


def _figures(systems: Sequence[System], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    ours, vllm = systems[0].rounds, systems[1].rounds
    pairs = [(mine["gateway us"], theirs["server us"]) for mine, theirs in zip(ours, vllm, strict=True)]
    figures = {"cpu_ratio_vllm": round(statistics.median(mine / theirs for mine, theirs in pairs), 3)}
    for row in rows:
        if row["system"] != "vllm":
            name = re.sub(r"\W", "_", row["system"])
            figures[f"added_ttft_ms_{name}"] = round(row["ttft_ms"] - rows[1]["ttft_ms"], 2)
    return figures


def _listener(port: int) -> psutil.Process:
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise RuntimeError(f"nobody listens on port {port}")


def _port(url: str) -> int:
    port = httpx.URL(url).port
    if port is None:
        raise RuntimeError(f"{url} has no port")
    return port


def _cluster() -> JoinwiseConfig:
    return JoinwiseConfig.model_validate(
        {
            "cluster": "bench-gateway",
            "models": [{"name": MODEL, "model": MODEL, "max_model_len": _MAX_MODEL_LEN}],
            "pools": [{"name": "stub", "model": MODEL, "role": "mixed", "engine": dict(_ENGINE)}],
            "gateway": {"http_port": 0, "grpc_port": 0, "drain_s": 2},
        }
    )
