"""Lanes: pooled point-to-point connections that carry the bytes of KV frames, beside gRPC's control."""
