"""Choosing workers and reserving their capacity, one atomic step in Redis."""
