"""Reads joinwise's configuration: defaults, then `joinwise.yaml`, then the environment; the last word wins.

Everything wrong is reported at once, each problem with its path and line. `JoinwiseConfig.source_of` says afterwards
where a value came from.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from joinwise.cluster import config_check, config_text
from joinwise.cluster.config_model import (
    AdapterConfig,
    Device,
    Dtype,
    GatewayConfig,
    JoinwiseConfig,
    JwtConfig,
    KvConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    PeerTlsConfig,
    PoolConfig,
    RayConfig,
    RedisConfig,
    RedisTlsConfig,
    Resources,
    Role,
    RouterConfig,
    TlsConfig,
    TracingConfig,
)
from joinwise.cluster.env import Override, overrides
from joinwise.cluster.errors import ConfigError

__all__ = [
    "DEMO_MODEL",
    "AdapterConfig",
    "Device",
    "Dtype",
    "GatewayConfig",
    "JoinwiseConfig",
    "JwtConfig",
    "KvConfig",
    "LimitsConfig",
    "LogConfig",
    "ModelConfig",
    "PeerTlsConfig",
    "PoolConfig",
    "RayConfig",
    "RedisConfig",
    "RedisTlsConfig",
    "Resources",
    "Role",
    "RouterConfig",
    "TlsConfig",
    "TracingConfig",
    "default_config",
    "json_schema",
    "load_config",
    "redacted",
]

#: The model that comes with the package and needs no network.
DEMO_MODEL = "smollm2-135m-instruct"
_GPU = Path("/dev/nvidia0")
_DEMO_KV_CACHE_BYTES = 200 << 20  # 23 kB a token in bfloat16: four full contexts, two in float32


def load_config(path: str | os.PathLike[str] | None, env: Mapping[str, str] | None = None) -> JoinwiseConfig:
    """Read a configuration.

    Args:
        path: the YAML file; None takes the demo's configuration (`default_config`) as the base.
        env: environment to read `JOINWISE_` variables from; None means the process's own.

    Raises:
        ConfigError: the file cannot be read or something in it is wrong; `problems` holds every finding.
    """
    found, problems = overrides(os.environ if env is None else env)
    name = "the configuration" if path is None else os.fspath(path)
    env = os.environ if env is None else env
    if path is None:
        data, lines = _demo("gpu" if _GPU.exists() else "cpu"), dict[str, int]()
    else:
        data, lines, more = _read(Path(path))
        problems += more
    sources = {place: f"{name}:{line}" for place, line in lines.items()}
    for override in found:
        problems += _apply(data, override, sources)
    config = _validated(data, sources, problems, name)
    if password := env.get("JOINWISE_REDIS_PASSWORD"):
        config.redis.url = _with_password(config.redis.url, password)
    return config


def default_config(device: Device = "auto") -> JoinwiseConfig:
    """The demo: the bundled model, one prefill and one decode worker with a core each, embedded Redis."""
    return _validated(_demo(device), {}, [], "the demo's configuration")


def json_schema() -> dict[str, Any]:
    """JSON schema of joinwise.yaml, for editors and the chart."""
    schema = JoinwiseConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "joinwise.yaml"}


def redacted(config: JoinwiseConfig) -> dict[str, Any]:
    """`config` as plain data with API keys and passwords blacked out, fit to be shown."""
    data = config.model_dump(mode="json")
    data["gateway"]["api_keys"] = ["***"] * len(config.gateway.api_keys)
    data["redis"]["url"] = re.sub(r"//([^/@]*:)?[^/@]*@", r"//\1***@", data["redis"]["url"])
    return data


def _with_password(url: str, password: str) -> str:
    """The URL with this password, if it names a server and has none."""
    scheme, separator, rest = url.partition("://")
    if not separator or "@" in rest.split("/")[0]:
        return url
    return f"{scheme}://:{quote(password, safe='')}@{rest}"


def _demo(device: Device) -> dict[str, Any]:
    def pool(role: Role) -> dict[str, Any]:
        engine = {"enforce_eager": True, "kv_cache_memory_bytes": _DEMO_KV_CACHE_BYTES, "max_num_seqs": 16}
        return {
            "name": role,
            "model": DEMO_MODEL,
            "role": role,
            "device": device,
            "resources": {"num_cpus": 1, "num_gpus": 0.4 if device == "gpu" else 0},
            "threads": 1,
            "engine": engine,
        }

    return {
        "cluster": "demo",
        "models": [{"name": DEMO_MODEL, "model": DEMO_MODEL, "max_model_len": 2048}],
        "pools": [pool("prefill"), pool("decode")],
    }


def _read(path: Path) -> tuple[Any, dict[str, int], list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from error
    try:
        data, lines, problems = config_text.parse(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if data is None:
        raise ConfigError(f"{path} is empty; `joinwise config show` prints a configuration to start from")
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(data).__name__}")
    return data, lines, problems


def _apply(data: Any, override: Override, sources: dict[str, str]) -> list[str]:
    """Put one value of the environment into `data`; the problem, if it has no place there."""
    *parents, last = override.path
    node = data
    for i, key in enumerate(parents):
        child: Any = [] if isinstance(override.path[i + 1], int) else {}
        problem = _place(node, key, child, override, keep=True)
        if problem:
            return [problem]
        node = node[key]
    problem = _place(node, last, copy.deepcopy(override.value), override, keep=False)
    sources[config_text.spell(override.path)] = f"environment variable {override.variable}"
    return [problem] if problem else []


def _place(node: Any, key: str | int, value: Any, override: Override, *, keep: bool) -> str | None:
    """Set node[key], or with `keep` only if nothing is there; the reason why that is impossible, if it is."""
    if isinstance(key, int):
        if not isinstance(node, list) or key > len(node):
            length = len(node) if isinstance(node, list) else 0
            return f"{override.variable}: item {key} does not follow the {length} that the configuration has"
        if key == len(node):
            node.append(value)
        elif not keep or node[key] is None:
            node[key] = value
        return None
    if not isinstance(node, dict):
        return f"{override.variable}: the configuration has a plain value where '{key}' would go"
    if not keep or node.get(key) is None:
        node[key] = value
    return None


def _validated(data: Any, sources: dict[str, str], problems: list[str], name: str) -> JoinwiseConfig:
    config: JoinwiseConfig | None = None
    try:
        config = JoinwiseConfig.model_validate(data)
        problems = [*problems, *config_check.problems(config)]
    except ValidationError as error:
        problems = [*problems, *config_text.sentences(error, JoinwiseConfig, sources)]
    if problems or config is None:
        listed = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{name} is wrong: {listed}", problems=tuple(problems))
    config.remember_sources(sources)
    return config
