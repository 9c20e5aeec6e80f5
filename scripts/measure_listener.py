"""Measures what stands between a client and a Serve replica: the replica's own socket, Serve's proxy, direct ingress.

    python scripts/measure_listener.py [--seconds 3] [--json out.json]

One replica, one trivial handler, reached in the ways that are compared, in turn, on one Ray. Direct ingress needs a
Ray of its own (its switch is read when Ray starts), with the replica's own socket measured again beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

REQUEST = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
ROUNDS = 3


async def load(port: int, clients: int, seconds: float) -> list[float]:
    """Seconds of every request that `clients` keep-alive connections made."""
    taken: list[float] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (begin := time.perf_counter()) < end:
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            taken.append(time.perf_counter() - begin)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return taken


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(direct: bool, seconds: float) -> dict[str, float]:
    """Start Ray, Serve and one replica; returns the figures of each way in."""
    import ray
    import uvicorn
    from fastapi import FastAPI
    from ray import serve

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    proxy, own = free_port(), free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": proxy})
    api = FastAPI()

    @api.get("/hello")
    def hello() -> dict[str, str]:
        return {"hello": "world"}

    @serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    @serve.ingress(api)
    class Replica:
        async def __init__(self, port: int) -> None:
            config = uvicorn.Config(api, host="127.0.0.1", port=port, log_level="error", lifespan="off")
            self.server = uvicorn.Server(config)
            self.server.install_signal_handlers = lambda: None
            self.task = asyncio.create_task(self.server.serve())

    serve.run(Replica.bind(own), route_prefix="/")
    time.sleep(2)
    ways = {"own": own, "direct": 30000} if direct else {"own": own, "proxy": proxy}
    figures: dict[str, float] = {}
    for clients in (1, 16):
        found: dict[str, list[list[float]]] = {way: [] for way in ways}
        for way in [*ways] * ROUNDS:
            found[way].append(asyncio.run(load(ways[way], clients, seconds)))
        for way, rounds in found.items():
            figures[f"{way}_ms_p50_{clients}"] = 1000 * statistics.median(each for round_ in rounds for each in round_)
            figures[f"{way}_rps_{clients}"] = statistics.median(len(round_) / seconds for round_ in rounds)
    serve.shutdown()
    ray.shutdown()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--direct", action="store_true", help="one part only: direct ingress")
    arguments = parser.parse_args()
    if arguments.direct:
        print(json.dumps(measure(True, arguments.seconds)))
        return
    figures = {f"{name}": value for name, value in measure(False, arguments.seconds).items()}
    command = [sys.executable, __file__, "--direct", "--seconds", str(arguments.seconds)]
    environment = os.environ | {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1"}
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    if second.returncode:
        print("direct ingress could not be measured:", second.stderr.strip().splitlines()[-1], file=sys.stderr)
    else:
        beside = json.loads(second.stdout.strip().splitlines()[-1])
        figures |= {name.replace("own", "own_beside_direct"): value for name, value in beside.items()}
    for name, value in sorted(figures.items()):
        print(f"{name:28} {value:10.2f}")
    if arguments.json:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()}
        arguments.json.write_text(json.dumps({"bench": "listener", "machine": machine, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
