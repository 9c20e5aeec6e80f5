"""Generated protobuf messages: every field of a descriptor, with values that lie at the edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message
from hypothesis import strategies as st

_DEPTH = 3
_TEXT = st.text(max_size=12) | st.sampled_from(["", "\0", "{}", "[", "default", "../x", "tørch.float32", "a" * 4096])


def _ints(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high) | st.sampled_from([low, 0, 1, high])


_SCALARS: Mapping[int, st.SearchStrategy[Any]] = {
    Field.CPPTYPE_INT32: _ints(-(1 << 31), (1 << 31) - 1),
    Field.CPPTYPE_UINT32: _ints(0, (1 << 32) - 1),
    Field.CPPTYPE_INT64: _ints(-(1 << 63), (1 << 63) - 1),
    Field.CPPTYPE_UINT64: _ints(0, (1 << 64) - 1),
    Field.CPPTYPE_DOUBLE: st.floats(),
    Field.CPPTYPE_FLOAT: st.floats(width=32),
    Field.CPPTYPE_BOOL: st.booleans(),
}


def messages(kind: type[Message], given: Mapping[str, st.SearchStrategy[Any]] | None = None) -> st.SearchStrategy[Any]:
    """Messages of a type, any of whose fields may be set.

    Args:
        given: strategies for top-level fields by name, so that some get past the first check.
    """
    return _fields(kind.DESCRIPTOR, given or {}, 0).map(lambda values: kind(**values))


def _fields(descriptor: Any, given: Mapping[str, st.SearchStrategy[Any]], depth: int) -> st.SearchStrategy[Any]:
    optional = {
        field.name: given[field.name] if field.name in given else _field(field, depth)
        for field in descriptor.fields
        if field.message_type is None or depth < _DEPTH
    }
    return st.fixed_dictionaries({}, optional=optional)


def _field(field: Any, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return st.dictionaries(_TEXT, _field(field.message_type.fields_by_name["value"], depth + 1), max_size=2)
    if field.message_type is not None:
        one = _fields(field.message_type, {}, depth + 1)
    elif field.cpp_type == Field.CPPTYPE_ENUM:
        one = st.sampled_from([value.number for value in field.enum_type.values]) | st.integers(-3, 99)
    elif field.type == Field.TYPE_BYTES:
        one = st.binary(max_size=40)
    elif field.cpp_type == Field.CPPTYPE_STRING:
        one = _TEXT
    else:
        one = _SCALARS[field.cpp_type]
    return st.lists(one, max_size=4) if field.is_repeated else one
