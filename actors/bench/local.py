"""A cluster of the benchmark's own, started and stopped with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from joinwise.actors.bench.server import behind_clients
from joinwise.actors.launcher import launched
from joinwise.cluster.config import JoinwiseConfig


@contextmanager
def local_cluster(config: JoinwiseConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """Run a cluster in a process of its own; yields its addresses and Redis' URL. Errors as for `launched`."""
    file = folder / f"{config.cluster}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with launched(config.cluster, file, file.with_suffix(".log")) as (launcher, facts):
        behind_clients(launcher.pid)
        yield facts
