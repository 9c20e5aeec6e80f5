"""The seams to vLLM, one module each. A vLLM upgrade touches this folder only."""
