"""The gateway: vLLM's front end over a cluster of engine cores."""
