"""Plain vLLM, to compare with: its own unmodified HTTP server, in float32 on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.cluster import MODEL

from joinwise.actors.bench.plain import plain_vllm

_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",  # its 5 s are httpx's too: a client would write while the server closes
}


@dataclass(frozen=True)
class PlainServer:
    """vLLM's own server, ready.

    Attributes:
        http: base URL without /v1.
    """

    http: str


@contextmanager
def plain_server(model: str, folder: Path, **arguments: Any) -> Iterator[PlainServer]:
    """Run it until the context ends; afterwards no process of it is left.

    Args:
        model: local folder.
        folder: where its log goes.
        arguments: of vLLM's server by name, beside those of every engine here.
    """
    engine = {"dtype": "float32", "enforce_eager": True, **arguments}
    with plain_vllm(model, MODEL, (), engine, folder / "plain-vllm.log", _SETTINGS) as url:
        yield PlainServer(url)
