"""The one place that knows which environment variables joinwise reads.

`JOINWISE_<SECTION>__<KEY>` sets a value of the configuration, list items by number: `JOINWISE_GATEWAY__HTTP_PORT=9000`,
`JOINWISE_POOLS__0__REPLICAS=2`, `JOINWISE_POOLS__0__ENGINE__BLOCK_SIZE=64`. Values are read as YAML, so `[1, 2]`,
`true` and `null` mean what they mean in the file, except where the key holds text. The variables of `OTHERS` are no
part of the configuration; any other `JOINWISE_` name is refused, because it is a misspelling.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from joinwise.cluster.config_model import JoinwiseConfig
from joinwise.cluster.config_text import nearest

PREFIX = "JOINWISE_"

#: Variables with the prefix that are no configuration, and what they do.
OTHERS = {
    "JOINWISE_HOME": "folder of running clusters' state (default ~/.joinwise)",
    "JOINWISE_CACHE": "folder of converted models (default: joinwise in the user's cache folder)",
    "JOINWISE_CONFIG": "configuration file of the command line when -f is not given",
    "JOINWISE_DEBUG": "the command line shows tracebacks instead of one line",
    "JOINWISE_API_KEY": "bearer token that the client SDK sends",
    "JOINWISE_REDIS_PASSWORD": "password of the Redis server, instead of one inside its URL",
    "JOINWISE_TARGET": "host:port that the client SDK and `joinwise chat` talk to",
    "JOINWISE_TEST_DEVICE": "device that the test suite uses (cpu or gpu)",
}

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Override:
    """One value from the environment: where it goes, what it is, and the variable it came from."""

    path: KeyPath
    value: Any
    variable: str


def home(env: Mapping[str, str]) -> Path:
    """Folder of running clusters' state."""
    return Path(env.get("JOINWISE_HOME") or Path.home() / ".joinwise")


def overrides(env: Mapping[str, str]) -> tuple[list[Override], list[str]]:
    """The configuration values in `env`, sorted by name, and a sentence for each variable that fits nowhere."""
    found: list[Override] = []
    problems: list[str] = []
    for variable in sorted(env, key=_natural):
        if not variable.startswith(PREFIX) or variable in OTHERS:
            continue
        try:
            path, annotation = _resolve(variable)
            found.append(Override(path, _parse(variable, env[variable], annotation), variable))
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def _natural(variable: str) -> tuple[tuple[int, str], ...]:
    """Order in which POOLS__2 comes before POOLS__10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in variable.split("__"))


def _resolve(variable: str) -> tuple[KeyPath, Any]:
    """Follow a variable's name down the tree. Raises ValueError where it leads nowhere."""
    annotation: Any = JoinwiseConfig
    path: list[str | int] = []
    for segment in variable.removeprefix(PREFIX).split("__"):
        key = segment.lower()
        kind = _container(annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if key not in kind.model_fields:
                known = [*kind.model_fields] if path else [*kind.model_fields, *(name[9:].lower() for name in OTHERS)]
                raise ValueError(f"unknown environment variable '{variable}'{nearest(key, known, _spell(path))}")
            annotation = kind.model_fields[key].annotation
            path.append(key)
        elif get_origin(kind) is list:
            if not key.isdigit():
                raise ValueError(f"environment variable '{variable}': '{segment}' must be the number of a list item")
            annotation = get_args(kind)[0]
            path.append(int(key))
        elif get_origin(kind) is dict:
            annotation = get_args(kind)[1]
            path.append(key)
        elif kind is Any:
            path.append(key)
        else:
            raise ValueError(f"environment variable '{variable}': '{_spell(path).lower()}' is a value, not a section")
    return tuple(path), annotation


def _spell(path: list[str | int]) -> str:
    return PREFIX + "".join(f"{str(part).upper()}__" for part in path)


def _container(annotation: Any) -> Any:
    """The type inside Annotated and Optional."""
    if get_origin(annotation) is Annotated:
        return _container(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [_container(arg) for arg in get_args(annotation) if arg is not type(None)]
        return inner[0] if len(inner) == 1 else annotation
    return annotation


def _parse(variable: str, text: str, annotation: Any) -> Any:
    """Text stays text where the key holds text: a revision of 0123 is no number."""
    kind = _container(annotation)
    if kind is str or get_origin(kind) is Literal:
        return None if text == "null" and kind is not annotation else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"environment variable '{variable}' is not valid YAML: {str(error).splitlines()[0]}"
        ) from error
