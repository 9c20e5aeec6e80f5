from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_BLOCKS: _ClassVar[Encoding]
    ENCODING_PLAIN: _ClassVar[Encoding]
    ENCODING_INT8: _ClassVar[Encoding]
    ENCODING_FP8: _ClassVar[Encoding]
    ENCODING_LOSSLESS: _ClassVar[Encoding]
ENCODING_UNSPECIFIED: Encoding
ENCODING_BLOCKS: Encoding
ENCODING_PLAIN: Encoding
ENCODING_INT8: Encoding
ENCODING_FP8: Encoding
ENCODING_LOSSLESS: Encoding

class KvLayout(_message.Message):
    __slots__ = ("protocol_version", "dtype", "block_size", "layers", "interior", "model_digest")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    INTERIOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    dtype: str
    block_size: int
    layers: _containers.RepeatedCompositeFieldContainer[KvLayer]
    interior: str
    model_digest: str
    def __init__(self, protocol_version: _Optional[int] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[KvLayer, _Mapping]]] = ..., interior: _Optional[str] = ..., model_digest: _Optional[str] = ...) -> None: ...

class KvLayer(_message.Message):
    __slots__ = ("name", "block_bytes", "num_heads", "first_head", "total_heads", "parts", "head_dim")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    TOTAL_HEADS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    name: str
    block_bytes: int
    num_heads: int
    first_head: int
    total_heads: int
    parts: int
    head_dim: int
    def __init__(self, name: _Optional[str] = ..., block_bytes: _Optional[int] = ..., num_heads: _Optional[int] = ..., first_head: _Optional[int] = ..., total_heads: _Optional[int] = ..., parts: _Optional[int] = ..., head_dim: _Optional[int] = ...) -> None: ...

class LayoutRequest(_message.Message):
    __slots__ = ("layout", "coding")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CODING_FIELD_NUMBER: _ClassVar[int]
    layout: KvLayout
    coding: bool
    def __init__(self, layout: _Optional[_Union[KvLayout, _Mapping]] = ..., coding: _Optional[bool] = ...) -> None: ...

class CodingSpeed(_message.Message):
    __slots__ = ("encoding", "numbers_per_s")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_PER_S_FIELD_NUMBER: _ClassVar[int]
    encoding: Encoding
    numbers_per_s: float
    def __init__(self, encoding: _Optional[_Union[Encoding, str]] = ..., numbers_per_s: _Optional[float] = ...) -> None: ...

class LayoutResponse(_message.Message):
    __slots__ = ("layout", "instance", "lane_address", "lane_kinds", "largest_payload", "coding")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    LANE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LANE_KINDS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CODING_FIELD_NUMBER: _ClassVar[int]
    layout: KvLayout
    instance: int
    lane_address: str
    lane_kinds: _containers.RepeatedScalarFieldContainer[str]
    largest_payload: int
    coding: _containers.RepeatedCompositeFieldContainer[CodingSpeed]
    def __init__(self, layout: _Optional[_Union[KvLayout, _Mapping]] = ..., instance: _Optional[int] = ..., lane_address: _Optional[str] = ..., lane_kinds: _Optional[_Iterable[str]] = ..., largest_payload: _Optional[int] = ..., coding: _Optional[_Iterable[_Union[CodingSpeed, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("transfer_id", "epoch", "num_tokens", "first_token", "instance", "encoding", "wire_dtype", "first_head", "num_heads", "layers", "lane_id", "streams")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LANE_ID_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    num_tokens: int
    first_token: int
    instance: int
    encoding: Encoding
    wire_dtype: str
    first_head: int
    num_heads: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    lane_id: int
    streams: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., num_tokens: _Optional[int] = ..., first_token: _Optional[int] = ..., instance: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., wire_dtype: _Optional[str] = ..., first_head: _Optional[int] = ..., num_heads: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., lane_id: _Optional[int] = ..., streams: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    def __init__(self, frame: _Optional[bytes] = ...) -> None: ...
