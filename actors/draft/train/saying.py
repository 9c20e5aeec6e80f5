"""How a training tells what it does."""

from collections.abc import Callable

Say = Callable[[str, int, int, str], None]
"""Told what is being done, how much of it is done, of how much, and a remark."""
