"""Benchmarks: correctness first, then times against a named baseline in the same run."""
