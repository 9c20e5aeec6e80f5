"""The client SDK: `Client` and `AsyncClient` over the gRPC `Inference` service.

    from joinwise.cluster.client import Client

    with Client("localhost:8001") as client:
        print(client.generate("The capital of France is", max_tokens=16).text)
        with client.generate(messages=[{"role": "user", "content": "hello"}], stream=True) as stream:
            for event in stream:
                ...

Needs grpc and protobuf, and nothing that runs models. Failures are errors of `joinwise.cluster.errors`.
"""

from joinwise.cluster.client.async_client import AsyncClient, AsyncStream
from joinwise.cluster.client.channel import TLS
from joinwise.cluster.client.failures import ClientClosedError, SequenceGapError, UnreachableError
from joinwise.cluster.client.sync_client import Client, Stream
from joinwise.cluster.client.types import (
    Choice,
    ClusterStatus,
    Delta,
    Event,
    Finished,
    GenerateOptions,
    Generation,
    KvLinkStatus,
    Model,
    Started,
    TokenLogprob,
    ToolCall,
    Usage,
    WorkerStatus,
)
from joinwise.cluster.errors import JoinwiseError

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "ClientClosedError",
    "ClusterStatus",
    "Delta",
    "Event",
    "Finished",
    "GenerateOptions",
    "Generation",
    "JoinwiseError",
    "KvLinkStatus",
    "Model",
    "SequenceGapError",
    "Started",
    "Stream",
    "TokenLogprob",
    "ToolCall",
    "UnreachableError",
    "Usage",
    "WorkerStatus",
]
