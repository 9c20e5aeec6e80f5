"""Turns YAML text into plain data that knows its line numbers, and pydantic's findings into sentences."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def spell(path: Sequence[str | int]) -> str:
    """("pools", 0, "role") -> "pools[0].role"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """ "; did you mean '…'?", or the known names when nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{prefix}{close[0].upper() if prefix else close[0]}'?"
    return f"; known: {', '.join(sorted(known))}"


def parse(text: str) -> tuple[Any, dict[str, int], list[str]]:
    """Plain data, the line of every path in it (counted from 1), and problems such as a key given twice.

    Raises:
        ValueError: the text is not YAML; the message names the line.
    """
    lines: dict[str, int] = {}
    problems: list[str] = []
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        data = None if root is None else _build(loader, root, (), lines, problems)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else "nested without end") from error
    finally:
        if loader is not None:
            loader.dispose()
    return data, lines, problems


def _build(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    path: tuple[str | int, ...],
    lines: dict[str, int],
    problems: list[str],
) -> Any:
    lines.setdefault(spell(path), node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), lines, problems) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    own = [str(key.value) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    loader.flatten_mapping(node)
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        lines[spell((*path, key))] = key_node.start_mark.line + 1
        data[key] = _build(loader, value_node, (*path, key), lines, problems)
    for key in sorted({key for key in own if own.count(key) > 1}):
        problems.append(f"key '{spell((*path, key))}' is given twice (line {lines[spell((*path, key))]})")
    return data


def sentences(error: ValidationError, root: type[BaseModel], where: Mapping[str, str]) -> list[str]:
    """One sentence per finding. `where` gives the source of a path, for example "joinwise.yaml:7"."""
    return [_sentence(detail, root, where) for detail in error.errors(include_url=False)]


def _sentence(detail: ErrorDetails, root: type[BaseModel], where: Mapping[str, str]) -> str:
    path = detail["loc"]
    at = f" ({where[spell(path)]})" if spell(path) in where else ""
    if detail["type"] == "extra_forbidden":
        parent = spell(path[:-1])
        known = [*_fields(root, path[:-1])]
        inside = f" in {parent}" if parent else ""
        return f"unknown key '{path[-1]}'{inside}{at}{nearest(str(path[-1]), known)}"
    if detail["type"] == "missing":
        return f"{spell(path)} is missing"
    text = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "string_pattern_mismatch" and path[-1] in ("cluster", "name"):
        text = "must be lower-case letters, digits and inner hyphens, at most 63"
    given = detail["input"]
    if "api_keys" in path or path[-1] == "url":
        given = ()  # a secret, or an address that may hold one
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{spell(path)}{at}: {text[0].lower() + text[1:]}{shown if 'belongs to joinwise' not in text else ''}"


def _fields(root: type[BaseModel], path: Sequence[str | int]) -> Mapping[str, object]:
    """The keys that the section at `path` knows."""
    section: type[BaseModel] | None = root
    for part in path:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return {}
        section = _section_inside(section.model_fields[part].annotation)
    return section.model_fields if section else {}


def _section_inside(annotation: Any) -> type[BaseModel] | None:
    """The model class inside list[…], Optional and Annotated, or None."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for arg in get_args(annotation) if (found := _section_inside(arg))), None)
