"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from joinwise.cluster.client import Client

Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        envvar="JOINWISE_TARGET",
        help="The gateway's gRPC listener, host:port; without it the cluster that runs on this machine.",
        show_default=False,
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="JOINWISE_API_KEY", help="API key.", show_default=False),
]
Tls = Annotated[bool, typer.Option("--tls", help="Speak TLS.")]
Ca = Annotated[
    Path | None, typer.Option("--ca", help="PEM file of the authority to trust; implies --tls.", show_default=False)
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds that the call may take in all.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        envvar="JOINWISE_CONFIG",
        help="Configuration file; without one ./joinwise.yaml if it is there, else the demo's.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis",
        envvar="JOINWISE_REDIS_URL",
        help="The cluster's Redis; without it that of the cluster that runs on this machine.",
        show_default=False,
    ),
]
ClusterName = Annotated[str, typer.Option("--cluster", help="The cluster's name, with --redis.")]

Picked = TypeVar("Picked")
DEFAULT_TARGET = "localhost:8001"
DEFAULT_FILE = Path("joinwise.yaml")


def connect(target: str | None, token: str | None, tls: bool, ca: Path | None, timeout: float) -> Client:
    """A client for the gateway that the options name."""
    from joinwise.cluster.client import TLS, Client
    from joinwise.cluster.errors import ConfigError

    if ca is not None and not os.access(ca, os.R_OK):
        raise ConfigError(f"cannot read {ca}")
    return Client(target or default_target(), token=token, tls=TLS(ca=ca) if ca is not None else tls, timeout=timeout)


def default_target() -> str:
    """The gRPC address of the cluster that `joinwise up` last made ready on this machine, else the usual port."""
    return _last_ready(lambda facts: str(facts["addresses"]["grpc"])) or DEFAULT_TARGET


def http_of() -> str:
    """The URL of the gateway of the cluster that `joinwise up` last made ready on this machine.

    Raises:
        ConfigError: no cluster runs here.
    """
    from joinwise.cluster.errors import ConfigError

    found = _last_ready(lambda facts: str(facts["addresses"]["http"]))
    if found is None:
        raise ConfigError("no cluster runs on this machine: name a gateway")
    return found


def redis_of(url: str | None, cluster: str) -> tuple[str, str]:
    """URL of Redis and name of the cluster that the options name, or of the one that runs on this machine.

    Raises:
        ConfigError: there is no URL, and no cluster runs here.
    """
    from joinwise.cluster.errors import ConfigError

    found = (url, cluster) if url else None
    if url is None:
        found = _last_ready(lambda facts: (str(facts["redis_url"]), str(facts["cluster"])))
    if not found or not found[0]:
        raise ConfigError("no cluster runs on this machine: say --redis URL and --cluster NAME")
    return found


def _last_ready(pick: Callable[[dict[str, Any]], Picked]) -> Picked | None:
    """What `pick` finds in the run file of the cluster that was last made ready on this machine."""
    from joinwise.cluster.env import home

    found: list[tuple[float, Picked]] = []
    for file in (home(os.environ) / "run").glob("*.json"):
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            found.append((float(facts["started"]), pick(facts)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not ready yet, or half written
    return max(found, key=lambda each: each[0])[1] if found else None


def config_path(file: Path | None) -> Path | None:
    """The configuration file that applies; None for the demo's configuration."""
    if file is not None:
        return file
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None
