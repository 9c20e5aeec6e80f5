"""Codecs for KV on its way between workers."""
