"""Capacity planning: which machines, in which pools, for a trace and its objectives, at the least cost or power."""
