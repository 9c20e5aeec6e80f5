"""Drafting for speculation: the draft actor with its drafters, and the end that asks it. No vLLM in here."""
