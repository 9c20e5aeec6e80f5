"""How KV frames cross from one worker to another."""
