"""What both ends of `draft.proto` share: the version, the limits, and the hash that binds a draft to its tokens."""

import numpy as np
import xxhash

PROTOCOL_VERSION = 1
MAX_K = 64
"""Ids that anybody may ask for, or send, for one sequence in one round."""
MAX_ASKS = 4096
"""Sequences in one round."""
MAX_TOKENS = 1 << 20
"""Tokens of one sequence."""
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # An engine that is idle for long sends no round; its pings must not end the stream.
    ("grpc.http2.max_pings_without_data", 0),
]


def prefix_hash(tokens: np.ndarray) -> int:
    """Hash of a sequence's tokens.

    Args:
        tokens: shape (n,), of any integer type; ids fit into 32 bits.
    """
    return int(xxhash.xxh3_64_intdigest(tokens.astype("<u4").tobytes()))
