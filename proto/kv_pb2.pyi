from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("name", "block_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    block_bytes: int
    def __init__(self, name: _Optional[str] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class LayoutRequest(_message.Message):
    __slots__ = ("layout",)
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    layout: KvLayout
    def __init__(self, layout: _Optional[_Union[KvLayout, _Mapping]] = ...) -> None: ...

class LayoutResponse(_message.Message):
    __slots__ = ("layout", "instance")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    layout: KvLayout
    instance: int
    def __init__(self, layout: _Optional[_Union[KvLayout, _Mapping]] = ..., instance: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("transfer_id", "epoch", "first_block", "num_blocks", "layout_digest", "num_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    first_block: int
    num_blocks: int
    layout_digest: str
    num_tokens: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., layout_digest: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    def __init__(self, frame: _Optional[bytes] = ...) -> None: ...
