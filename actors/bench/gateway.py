"""`joinwise bench gateway`: what the way to an engine costs, when the engine costs nothing.

The same engine with a model that is never run (`stub_executor`) stands behind joinwise's gateway (gRPC frames), behind
vLLM's own server (its client of several processes, over ZMQ) and, two of those servers, behind the routers
`vllm-router` and `smg` where they are installed. The systems take turns. CPU is counted for the processes between
client and engine: a gateway, a server without its engine, a router (its servers apart); Redis is reported by itself.
What each uses while nobody asks (`idle ms/s`) is measured first, and taken off: it is no request's.

What traces cost, and TLS at the clients' door, is measured on two more clusters of joinwise's in the same turns.
"""

import asyncio
import os
import re
import shutil
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from joinwise.actors.bench.local import local_cluster
from joinwise.actors.bench.plain import plain_vllm
from joinwise.actors.bench.serve import MODEL
from joinwise.actors.bench.server import free_port, server
from joinwise.actors.models import resolve_model
from joinwise.cluster.config import JoinwiseConfig

ROUTERS = ("vllm-router", "smg")
OURS, TRACED, SECURED = "joinwise", "joinwise traced", "joinwise tls"
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
        authority: file of the authority that its certificate comes from, where it speaks TLS.
    """

    name: str
    url: str
    processes: dict[str, psutil.Process]
    authority: str = ""
    idle: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def cpu(self) -> dict[str, float]:
        """Seconds of each, user and system."""
        return {name: sum(process.cpu_times()[:2]) for name, process in self.processes.items()}


def run(
    requests: int, at_once: int, rounds: int, say: Say, tls: Path | None = None
) -> tuple[dict[str, float], list[dict[str, Any]], list[str]]:
    """Run the benchmark.

    Args:
        requests: streams of each system in each round.
        at_once: of them.
        rounds: for the medians.
        say: is told what happens.
        tls: folder with `tls.crt`, `tls.key` and `ca.crt` for 127.0.0.1.

    Returns:
        Figures, one row for each system, and what was not measured and why.
    """
    missing = [] if tls is not None else ["TLS: --tls names a folder with tls.crt, tls.key and ca.crt for 127.0.0.1"]
    missing += [f"{name} is not on the PATH: pip install {name}" for name in ROUTERS if shutil.which(name) is None]
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="joinwise-bench-") as folder:
        systems = _start(stack, Path(folder), say, tls)
        asyncio.run(_measure(systems, requests, at_once, rounds, say))
    rows = [_row(system) for system in systems]
    return _figures(systems, rows), rows, missing


def _start(stack: ExitStack, folder: Path, say: Say, tls: Path | None) -> list[System]:
    systems = [_joinwise(stack, folder, say, OURS)]
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
        url = stack.enter_context(foreign_router(name, servers, "round_robin", folder / f"{name}.log"))
        behind = {f"server {number}": _listener(_port(each)) for number, each in enumerate(servers)}
        systems.append(System(name, url, {"router": _listener(_port(url)), **behind}))
    systems.append(_joinwise(stack, folder, say, TRACED, tracing={"endpoint": stack.enter_context(_collector())}))
    if tls is not None:
        files = {"cert": str(tls / "tls.crt"), "key": str(tls / "tls.key")}
        systems.append(_joinwise(stack, folder, say, SECURED, gateway={"tls": files}))
        systems[-1].authority = str(tls / "ca.crt")
    return systems


def _joinwise(stack: ExitStack, folder: Path, say: Say, name: str, **changes: dict[str, Any]) -> System:
    say(f"starting {name} with a stub engine")
    facts = stack.enter_context(local_cluster(_cluster(name, **changes), folder))
    url = facts["addresses"]["http"]
    ports = {"gateway": _port(url), "redis": _port(facts["redis_url"])}
    return System(name, url, {each: _listener(port) for each, port in ports.items()})


@contextmanager
def _collector() -> Iterator[str]:
    """The address of an OTLP collector that keeps nothing."""

    class Nothing(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - as in the protocol
            return trace_service_pb2.ExportTraceServiceResponse()

    listening = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Nothing(), listening)  # type: ignore[no-untyped-call]
    port = listening.add_insecure_port("127.0.0.1:0")
    listening.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        listening.stop(None)


def foreign_router(name: str, servers: Sequence[str], policy: str, log: Path) -> AbstractContextManager[str]:
    """One of `ROUTERS` before these servers; gives its URL. Errors as for `server`."""
    port = free_port()
    command = [name, *(["launch"] if name == "smg" else []), "--worker-urls", *servers, "--policy", policy]
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
            trusted = ssl.create_default_context(cafile=system.authority) if system.authority else True
            async with httpx.AsyncClient(base_url=system.url, timeout=120, verify=trusted) as client:
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
    rounds = {system.name: system.rounds for system in systems}

    def ratio(name: str, other: str, part: str) -> float:
        pairs = zip(rounds[name], rounds[other], strict=True)
        return round(statistics.median(mine["gateway us"] / theirs[part] for mine, theirs in pairs), 3)

    figures = {"cpu_ratio_vllm": ratio(OURS, "vllm", "server us")}
    for name, figure in ((TRACED, "cpu_ratio_traced"), (SECURED, "cpu_ratio_tls")):
        if name in rounds:
            figures[figure] = ratio(name, OURS, "gateway us")
    for row in rows:
        if row["system"] not in ("vllm", TRACED, SECURED):
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


def _cluster(name: str = OURS, **changes: dict[str, Any]) -> JoinwiseConfig:
    fixed: dict[str, Any] = {
        "cluster": f"bench-{name.replace(' ', '-')}",
        "models": [{"name": MODEL, "model": MODEL, "max_model_len": _MAX_MODEL_LEN}],
        "pools": [{"name": "stub", "model": MODEL, "role": "mixed", "engine": dict(_ENGINE)}],
    }
    gateway = {"http_port": 0, "grpc_port": 0, "drain_s": 2, **changes.pop("gateway", {})}
    return JoinwiseConfig.model_validate({**fixed, "gateway": gateway, **changes})
