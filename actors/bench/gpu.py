"""Whether a torch sees a GPU: ours, or that of another interpreter."""

import sys

import torch

from joinwise.actors.bench.remote import Remote


class Sight:
    """What an interpreter has."""

    def missing(self) -> str:
        """Why nothing can be measured on a GPU there; empty where there is one."""
        if torch.version.cuda is None:
            return f"torch {torch.__version__} of {sys.executable} is built without CUDA"
        return "" if torch.cuda.is_available() else f"torch of {sys.executable} sees no CUDA device"


def missing(python: str | None = None) -> str:
    """Why nothing can be measured on a GPU by an interpreter; ours by default. Empty where there is one."""
    if python is None:
        return Sight().missing()
    try:
        there = Remote(Sight, python=python)
    except (OSError, RuntimeError) as error:
        return f"{python} does not run joinwise: {error}"
    try:
        return str(there("missing"))
    finally:
        there.close()
