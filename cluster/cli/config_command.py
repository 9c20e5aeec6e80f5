"""`joinwise config`: what the configuration says, whether it is right, and its schema."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from joinwise.cluster.cli.options import ConfigFile, Json, config_path

app = typer.Typer(help="Show, check and describe the configuration.", no_args_is_help=True)


@app.command()
def show(file: ConfigFile = None, as_json: Json = False) -> None:
    """Print the whole configuration: defaults, then the file, then the environment. Secrets are blacked out."""
    import yaml

    from joinwise.cluster.config import load_config, redacted

    data = redacted(load_config(config_path(file)))
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        yaml.safe_dump(data, sys.stdout, sort_keys=False, allow_unicode=True)


@app.command()
def check(file: ConfigFile = None) -> None:
    """Say whether the configuration is right; exit 1 with every problem if it is not."""
    from joinwise.cluster.config import load_config

    path = config_path(file)
    config = load_config(path)
    workers = sum(pool.replicas for pool in config.pools)
    name = "the demo's configuration" if path is None else str(path)
    parts = f"{_count(len(config.models), 'model')}, {_count(len(config.pools), 'pool')}, {_count(workers, 'worker')}"
    typer.echo(f"{name} is right: cluster {config.cluster}, {parts}")


@app.command()
def schema(
    indent: Annotated[int, typer.Option(min=0, help="Spaces of indentation.")] = 2,
) -> None:
    """Print the JSON schema of joinwise.yaml, for editors and charts."""
    from joinwise.cluster.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=indent))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
