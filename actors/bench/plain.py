"""The named baseline: plain vLLM, its own server and its own engine, pinned to given cores."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from joinwise.actors.bench.server import free_port, server


@contextmanager
def plain_vllm(
    model_path: str,
    name: str,
    cores: Sequence[int],
    engine: dict[str, Any],
    log: Path,
    settings: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Run `vllm.entrypoints.openai.api_server` with one engine on these cores.

    vLLM binds the engine's threads; its HTTP process is left free to run anywhere, which favours it.

    Args:
        model_path: local folder.
        name: the name clients ask for.
        cores: cores of the engine, one thread each; with none, `settings` bind its threads.
        engine: engine arguments by name, as in joinwise.yaml.
        log: file for its output.
        settings: more variables of its environment.

    Yields:
        The server's base URL.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", model_path, "--served-model-name", name]
    for key, value in engine.items():
        flag = "--" + key.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **(settings or {}),
    }
    with server("plain vLLM", command, port, log, environment, computes=True) as url:
        yield url
