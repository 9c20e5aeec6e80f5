from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftRequest(_message.Message):
    __slots__ = ("hello", "round")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    hello: DraftHello
    round: DraftRound
    def __init__(self, hello: _Optional[_Union[DraftHello, _Mapping]] = ..., round: _Optional[_Union[DraftRound, _Mapping]] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("welcome", "answer")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    welcome: DraftWelcome
    answer: DraftAnswer
    def __init__(self, welcome: _Optional[_Union[DraftWelcome, _Mapping]] = ..., answer: _Optional[_Union[DraftAnswer, _Mapping]] = ...) -> None: ...

class DraftVocabulary(_message.Message):
    __slots__ = ("model", "size", "digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    size: int
    digest: str
    def __init__(self, model: _Optional[str] = ..., size: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class DraftHello(_message.Message):
    __slots__ = ("protocol_version", "cluster", "worker_id", "vocabulary")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    cluster: str
    worker_id: str
    vocabulary: DraftVocabulary
    def __init__(self, protocol_version: _Optional[int] = ..., cluster: _Optional[str] = ..., worker_id: _Optional[str] = ..., vocabulary: _Optional[_Union[DraftVocabulary, _Mapping]] = ...) -> None: ...

class DraftWelcome(_message.Message):
    __slots__ = ("protocol_version", "drafter", "vocabulary", "max_k", "hidden_size")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    drafter: str
    vocabulary: DraftVocabulary
    max_k: int
    hidden_size: int
    def __init__(self, protocol_version: _Optional[int] = ..., drafter: _Optional[str] = ..., vocabulary: _Optional[_Union[DraftVocabulary, _Mapping]] = ..., max_k: _Optional[int] = ..., hidden_size: _Optional[int] = ...) -> None: ...

class DraftRound(_message.Message):
    __slots__ = ("number", "patience_us", "asks", "ended")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_US_FIELD_NUMBER: _ClassVar[int]
    ASKS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    number: int
    patience_us: int
    asks: _containers.RepeatedCompositeFieldContainer[DraftAsk]
    ended: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., patience_us: _Optional[int] = ..., asks: _Optional[_Iterable[_Union[DraftAsk, _Mapping]]] = ..., ended: _Optional[_Iterable[int]] = ...) -> None: ...

class DraftAsk(_message.Message):
    __slots__ = ("sequence", "start", "token_ids", "prefix_hash", "k", "hidden")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASH_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prefix_hash: int
    k: int
    hidden: bytes
    def __init__(self, sequence: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., prefix_hash: _Optional[int] = ..., k: _Optional[int] = ..., hidden: _Optional[bytes] = ...) -> None: ...

class DraftAnswer(_message.Message):
    __slots__ = ("number", "drafts", "draft_us")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_US_FIELD_NUMBER: _ClassVar[int]
    number: int
    drafts: _containers.RepeatedCompositeFieldContainer[DraftTokens]
    draft_us: int
    def __init__(self, number: _Optional[int] = ..., drafts: _Optional[_Iterable[_Union[DraftTokens, _Mapping]]] = ..., draft_us: _Optional[int] = ...) -> None: ...

class DraftTokens(_message.Message):
    __slots__ = ("sequence", "prefix_hash", "token_ids", "unknown")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    prefix_hash: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    unknown: bool
    def __init__(self, sequence: _Optional[int] = ..., prefix_hash: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., unknown: _Optional[bool] = ...) -> None: ...
