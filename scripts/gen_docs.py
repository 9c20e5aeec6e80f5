"""Generate the reference pages of the documentation from what they describe.

    python scripts/gen_docs.py             write docs/reference/configuration.md and docs/reference/protocols.md
    python scripts/gen_docs.py --check     exit 1 and name what is not current

Owns those two pages. The configuration's comes from the pydantic tree, by way of its JSON schema; the protocols' from
the comments in `proto/*.proto`, as protoc hands them on.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

from joinwise.cluster.config_model import JoinwiseConfig

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Made by scripts/gen_docs.py: change what it describes instead. -->"
CONFIGURATION = """\
# Configuration reference

{note}

Every key of `joinwise.yaml`. Unknown keys are refused, and all problems are told at once, with their lines:
`joinwise config check`. A variable of the environment overrides a key, with `__` between its parts and list items by
number: `JOINWISE_GATEWAY__HTTP_PORT=9000`, `JOINWISE_POOLS__0__REPLICAS=2`. `joinwise config show` says where each
value came from, and `joinwise config schema` gives the JSON schema that this page is made of.
"""
PROTOCOLS = """\
# gRPC reference

{note}

Package `joinwise.v1`. Clients need the first file alone; the others are what the cluster's processes say to each other.
Gateways answer gRPC reflection, so that `grpcurl` and `buf curl` need no files.
"""
PROTOS = ("inference", "engine", "kv", "draft")
Schema = Mapping[str, Any]


def configuration() -> str:
    """Every setting, section by section in the order of the tree."""
    schema = JoinwiseConfig.model_json_schema()
    parts = [CONFIGURATION.format(note=NOTE)]
    for path, section in sections("", schema, schema["$defs"]):
        parts.append(f"\n## {f'`{path}`' if path else 'Top level'}\n\n{section.get('description', '').strip()}\n\n")
        parts.append("| key | takes | default | |\n| --- | --- | --- | --- |\n")
        required = section.get("required", ())
        for name, each in section["properties"].items():
            default = "**required**" if name in required else default_of(each)
            text = each.get("description") or _section_of(each, schema["$defs"]).get("description", "")
            cells = (f"`{name}`", takes(each, schema["$defs"]), default, text)
            parts.append(f"| {' | '.join(_cell(cell) for cell in cells)} |\n")
    return "".join(parts)


def sections(path: str, section: Schema, known: Schema) -> Iterator[tuple[str, Schema]]:
    """A section with its path, then those below it: `pools[].autoscale`, `router.tenants.<name>`."""
    yield path, section
    for name, each in section["properties"].items():
        inner = _section_of(each, known)
        if inner:
            below = f"{path}.{name}" if path else name
            kinds = [each, *each.get("anyOf", ())]
            suffix = next((s for k, s in (("items", "[]"), ("additionalProperties", ".<name>")) if k in kinds[0]), "")
            yield from sections(below + suffix, inner, known)


def _section_of(each: Schema, known: Schema) -> Schema:
    """The section that a key holds, one or many; empty for a plain value."""
    for kind in (each, *each.get("anyOf", ()), each.get("items", {}), each.get("additionalProperties", {})):
        if isinstance(kind, Mapping) and "$ref" in kind:
            return known[kind["$ref"].rpartition("/")[2]]  # type: ignore[no-any-return]
    return {}


def takes(each: Schema, known: Schema) -> str:
    """What a key accepts, in words: type, choices and bounds."""
    if "anyOf" in each:
        return " or ".join(takes(kind, known) for kind in each["anyOf"])
    if "$ref" in each:
        return "section"
    if "enum" in each or "const" in each:
        return ", ".join(f"`{value}`" for value in each.get("enum", [each.get("const")]))
    if each.get("type") == "array":
        return f"list of {_many(takes(each['items'], known))}"
    if each.get("type") == "object":
        inner = each.get("additionalProperties")
        return f"{_many(takes(inner, known))} by name" if isinstance(inner, Mapping) and inner else "values by name"
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "`true`, `false`", "null": "`null`"}
    return words[each["type"]] + _bounds(each)


def _many(kind: str) -> str:
    return {"section": "sections", "text": "texts", "integer": "integers", "number": "numbers"}.get(kind, kind)


def _bounds(each: Schema) -> str:
    low = [f"≥ {each['minimum']:,}"] if "minimum" in each else []
    low += [f"> {each['exclusiveMinimum']:,}"] if "exclusiveMinimum" in each else []
    high = [f"≤ {each['maximum']:,}"] if "maximum" in each else []
    return f" {', '.join(low + high)}" if low or high else ""


def default_of(each: Schema) -> str:
    """A default as it would be written; empty for a section, whose keys have their own."""
    return f"`{json.dumps(each['default'])}`" if "default" in each else ""


def _cell(text: str) -> str:
    return re.sub(r"\bNone\b", "`null`", re.sub(r"\s+", " ", text)).replace("|", "\\|").strip()


def protocols() -> str:
    """Services and messages of every proto file, with their comments."""
    parts = [PROTOCOLS.format(note=NOTE)]
    for file in _described():
        comments = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}
        parts.append(f"\n## `{file.name.rpartition('/')[2]}`\n")
        if about := _comment(comments, (12,)):  # 12: above `syntax`
            parts.append(f"\n{about}\n")
        for at, service in enumerate(file.service):
            parts.append(f"\n### service `{service.name}`\n\n{_comment(comments, (6, at))}\n\n")
            parts.append("| rpc | takes | gives | |\n| --- | --- | --- | --- |\n")
            for number, rpc in enumerate(service.method):
                asked, given = (
                    _typed(rpc.client_streaming, rpc.input_type),
                    _typed(rpc.server_streaming, rpc.output_type),
                )
                text = _comment(comments, (6, at, 2, number))
                parts.append(f"| `{rpc.name}` | {asked} | {given} | {_cell(text)} |\n")
        for at, message in enumerate(file.message_type):
            parts += _message(message, (4, at), comments)
        for at, enum in enumerate(file.enum_type):
            parts.append(f"\n### enum `{enum.name}`\n\n{_comment(comments, (5, at))}\n\n")
            parts.append("| value | number | |\n| --- | --- | --- |\n")
            for number, value in enumerate(enum.value):
                text = _cell(_comment(comments, (5, at, 2, number)))
                parts.append(f"| `{value.name}` | {value.number} | {text} |\n")
    return "".join(parts)


def _message(
    message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], comments: Mapping[tuple[int, ...], str]
) -> Iterator[str]:
    yield f"\n### `{message.name}`\n\n{_comment(comments, path)}\n"
    if message.field:
        yield "\n| field | number | type | |\n| --- | --- | --- | --- |\n"
    maps = {each.name: each for each in message.nested_type if each.options.map_entry}
    for at, field in enumerate(message.field):
        entry = maps.get(field.type_name.rpartition(".")[2])
        if entry is not None:
            kind = f"map of {_kind(entry.field[0])} to {_kind(entry.field[1])}"
        else:
            kind = f"{'repeated ' if field.label == field.LABEL_REPEATED else ''}{_kind(field)}"
        one_of = field.HasField("oneof_index") and not field.proto3_optional
        choice = f", one of `{message.oneof_decl[field.oneof_index].name}`" if one_of else ""
        yield f"| `{field.name}` | {field.number} | {kind}{choice} | {_cell(_comment(comments, (*path, 2, at)))} |\n"
    for at, nested in enumerate(message.nested_type):
        if nested.name not in maps:
            yield from _message(nested, (*path, 3, at), comments)


def _kind(field: descriptor_pb2.FieldDescriptorProto) -> str:
    name = field.type_name.rpartition(".")[2]
    return f"`{name}`" if name else field.Type.Name(field.type).removeprefix("TYPE_").lower()


def _typed(stream: bool, name: str) -> str:
    return f"{'stream of ' if stream else ''}`{name.rpartition('.')[2]}`"


def _comment(comments: Mapping[tuple[int, ...], str], path: tuple[int, ...]) -> str:
    """A comment as Markdown: brackets outside of `code` are no links."""
    lines = (line.strip() for line in comments.get(path, "").strip().splitlines())
    parts = "\n".join(lines).split("`")
    return "`".join(part if at % 2 else part.replace("[", "\\[") for at, part in enumerate(parts))


def _described() -> list[descriptor_pb2.FileDescriptorProto]:
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all.binpb"
        names = [f"joinwise/proto/{name}.proto" for name in PROTOS]
        arguments = ["protoc", f"-Ijoinwise/proto={ROOT / 'proto'}", f"-I{well_known}", "--include_source_info"]
        if protoc.main([*arguments, f"--descriptor_set_out={out}", *names]) != 0:
            sys.exit("gen_docs: protoc failed, see above")
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def pages() -> dict[Path, str]:
    """The pages as they should be."""
    return {REFERENCE / "configuration.md": configuration(), REFERENCE / "protocols.md": protocols()}


def stale() -> list[str]:
    """Pages that are not as they should be, by their path in the repository."""
    return [
        str(path.relative_to(ROOT))
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the reference pages of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not current")
    if parser.parse_args().check:
        if old := stale():
            sys.exit(f"gen_docs: not current (run `python scripts/gen_docs.py`): {', '.join(old)}")
        return
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
