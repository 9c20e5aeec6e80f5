from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("hello", "add", "abort", "continue_request")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    add: AddRequest
    abort: AbortRequests
    continue_request: ContinueRequest
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., add: _Optional[_Union[AddRequest, _Mapping]] = ..., abort: _Optional[_Union[AbortRequests, _Mapping]] = ..., continue_request: _Optional[_Union[ContinueRequest, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "vllm_version", "cluster", "gateway_id", "worker_id", "worker_epoch")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    vllm_version: str
    cluster: str
    gateway_id: str
    worker_id: str
    worker_epoch: int
    def __init__(self, protocol_version: _Optional[int] = ..., vllm_version: _Optional[str] = ..., cluster: _Optional[str] = ..., gateway_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ...) -> None: ...

class AddRequest(_message.Message):
    __slots__ = ("request", "again")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    request: _containers.RepeatedScalarFieldContainer[bytes]
    again: bool
    def __init__(self, request: _Optional[_Iterable[bytes]] = ..., again: _Optional[bool] = ...) -> None: ...

class AbortRequests(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ContinueRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "replay_token_ids", "recompute")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPLAY_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    replay_token_ids: _containers.RepeatedScalarFieldContainer[int]
    recompute: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., replay_token_ids: _Optional[_Iterable[int]] = ..., recompute: _Optional[bool] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("welcome", "frame", "transfer", "begun")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    frame: Frame
    transfer: TransferReport
    begun: Begun
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., transfer: _Optional[_Union[TransferReport, _Mapping]] = ..., begun: _Optional[_Union[Begun, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "worker_epoch", "vllm_version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker_epoch: int
    vllm_version: str
    def __init__(self, protocol_version: _Optional[int] = ..., worker_epoch: _Optional[int] = ..., vllm_version: _Optional[str] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, outputs: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TransferReport(_message.Message):
    __slots__ = ("request_id", "bytes", "wire_seconds", "exposed_seconds", "import_seconds", "transport", "recomputed", "failure", "local_hit_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IMPORT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    bytes: int
    wire_seconds: float
    exposed_seconds: float
    import_seconds: float
    transport: str
    recomputed: bool
    failure: str
    local_hit_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., bytes: _Optional[int] = ..., wire_seconds: _Optional[float] = ..., exposed_seconds: _Optional[float] = ..., import_seconds: _Optional[float] = ..., transport: _Optional[str] = ..., recomputed: _Optional[bool] = ..., failure: _Optional[str] = ..., local_hit_tokens: _Optional[int] = ...) -> None: ...

class UtilityRequest(_message.Message):
    __slots__ = ("method", "arguments")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    method: str
    arguments: bytes
    def __init__(self, method: _Optional[str] = ..., arguments: _Optional[bytes] = ...) -> None: ...

class UtilityResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: bytes
    def __init__(self, result: _Optional[bytes] = ...) -> None: ...

class KvLinksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvLinksResponse(_message.Message):
    __slots__ = ("links",)
    LINKS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[KvLinkReport]
    def __init__(self, links: _Optional[_Iterable[_Union[KvLinkReport, _Mapping]]] = ...) -> None: ...

class KvLinkReport(_message.Message):
    __slots__ = ("peer", "transport", "why", "codec", "codec_why", "bytes_per_s", "bytes", "streams", "failed", "retries", "refused")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PEER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_WHY_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    peer: str
    transport: str
    why: str
    codec: str
    codec_why: str
    bytes_per_s: float
    bytes: int
    streams: int
    failed: int
    retries: int
    refused: _containers.ScalarMap[str, int]
    def __init__(self, peer: _Optional[str] = ..., transport: _Optional[str] = ..., why: _Optional[str] = ..., codec: _Optional[str] = ..., codec_why: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., bytes: _Optional[int] = ..., streams: _Optional[int] = ..., failed: _Optional[int] = ..., retries: _Optional[int] = ..., refused: _Optional[_Mapping[str, int]] = ...) -> None: ...

class IdleRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class IdleResponse(_message.Message):
    __slots__ = ("scheduler_requests", "blocks_used", "blocks_total", "connector_entries", "kv_streams", "landing_bytes", "held", "failure_reasons", "transfers_completed", "transfers_failed")
    class FailureReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SCHEDULER_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CONNECTOR_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    KV_STREAMS_FIELD_NUMBER: _ClassVar[int]
    LANDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    FAILURE_REASONS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FAILED_FIELD_NUMBER: _ClassVar[int]
    scheduler_requests: int
    blocks_used: int
    blocks_total: int
    connector_entries: int
    kv_streams: int
    landing_bytes: int
    held: _containers.RepeatedScalarFieldContainer[str]
    failure_reasons: _containers.ScalarMap[str, int]
    transfers_completed: int
    transfers_failed: int
    def __init__(self, scheduler_requests: _Optional[int] = ..., blocks_used: _Optional[int] = ..., blocks_total: _Optional[int] = ..., connector_entries: _Optional[int] = ..., kv_streams: _Optional[int] = ..., landing_bytes: _Optional[int] = ..., held: _Optional[_Iterable[str]] = ..., failure_reasons: _Optional[_Mapping[str, int]] = ..., transfers_completed: _Optional[int] = ..., transfers_failed: _Optional[int] = ...) -> None: ...
