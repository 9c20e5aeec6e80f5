"""The named baseline of hand-offs: two plain vLLM servers, joined by vLLM's own NixlConnector.

The client does what vLLM's proxies do: it has the prompt prefilled, and asks the other server for the answer with the
block ids that the first one gave.
"""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from joinwise.actors.bench.plain import plain_vllm
from joinwise.actors.bench.serve import Answer, stream_into
from joinwise.actors.bench.server import free_port

_TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
_ASK = {"do_remote_decode": True, "do_remote_prefill": False}


class NixlPair:
    """Both servers; stopped unless they are asked, for their threads poll.

    Attributes:
        prefill, decode: their URLs.
    """

    def __init__(self, prefill: str, decode: str, processes: Sequence[psutil.Process]) -> None:
        self.prefill, self.decode = prefill, decode
        self._processes = processes
        self._stop()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let them run while this lasts."""
        self.resume()
        try:
            yield
        finally:
            self._stop()

    def resume(self) -> None:
        """Let them run."""
        for process in self._processes:
            process.resume()

    def _stop(self) -> None:
        for process in self._processes:
            process.suspend()


@contextmanager
def nixl_pair(
    model_path: str, name: str, cores: Sequence[int], engine: dict[str, Any], folder: Path
) -> Iterator[NixlPair]:
    """Run both servers.

    Args:
        model_path: local folder.
        name: the name clients ask for.
        cores: one core for each engine.
        engine: engine arguments by name, as in joinwise.yaml.
        folder: for their logs.
    """
    engine = engine | {"kv_transfer_config": json.dumps(_TRANSFER)}
    before = set(psutil.Process().children(recursive=True))
    with (
        _server("prefill", model_path, name, cores[0], engine, folder) as prefill,
        _server("decode", model_path, name, cores[1], engine, folder) as decode,
    ):
        pair = NixlPair(prefill, decode, [*set(psutil.Process().children(recursive=True)) - before])
        try:
            yield pair
        finally:
            pair.resume()  # what is stopped cannot end


async def ask_pair(prefill: httpx.AsyncClient, decode: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Stream one completion; its times count from the end of the prefill, as a client sees it.

    Raises:
        RuntimeError: one of the servers refuses, or nothing was handed over.
    """
    headers = {"x-request-id": uuid.uuid4().hex}
    first = body | {"stream": False, "max_tokens": 1, "kv_transfer_params": _ASK}
    response = await prefill.post("/v1/completions", json=first, headers=headers)
    if response.status_code != 200:
        raise RuntimeError(f"NIXL's prefill: {response.status_code}: {response.text}")
    begin = time.perf_counter()
    handed = response.json().get("kv_transfer_params")
    if not handed:
        raise RuntimeError("NIXL's prefill handed nothing over")
    answer = Answer()
    await stream_into(answer, decode, body | {"kv_transfer_params": handed}, headers, begin)
    return answer


def _server(
    role: str, model_path: str, name: str, core: int, engine: dict[str, Any], folder: Path
) -> AbstractContextManager[str]:
    side_channel = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return plain_vllm(model_path, name, [core], engine, folder / f"nixl-{role}.log", side_channel)
