"""The KV data plane: frames, the two halves of a transfer, and the transports between them."""
