"""KV blocks of any backend to the canonical wire layout and back."""
