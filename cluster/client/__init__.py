"""The client SDK: `Client` and `AsyncClient` over the gRPC `Inference` service."""
