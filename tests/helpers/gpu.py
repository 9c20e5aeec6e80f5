"""What a test needs of a GPU, and why it is skipped where that is not here: one sentence for each piece."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch


def no_cuda(devices: int = 1) -> str:
    """Why there are not so many CUDA devices; empty where there are."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "" if found >= devices else f"torch sees {found} CUDA devices of the {devices} needed"


def no_vllm() -> str:
    """Why vLLM cannot run on a GPU here; empty where it can."""
    if why := no_cuda():
        return why
    try:
        version("vllm")
    except PackageNotFoundError:
        return "vLLM's CUDA build (the package vllm) is not installed"
    return ""


def needs_cuda(piece: str, devices: int = 1) -> pytest.MarkDecorator:
    """Skip a piece of the tests, and say so, where CUDA devices are missing."""
    why = no_cuda(devices)
    return pytest.mark.skipif(bool(why), reason=f"{piece}: {why}")


def needs_vllm(piece: str) -> pytest.MarkDecorator:
    """Skip a piece of the tests, and say so, where vLLM cannot run on a GPU."""
    why = no_vllm()
    return pytest.mark.skipif(bool(why), reason=f"{piece}: {why}")
