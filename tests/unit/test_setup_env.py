"""`scripts/setup_env.sh` says clearly what is missing, picks the build that fits, and does nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands in for the environment's python: `-m pip` writes its arguments to a log, `-c` and `-m venv` do nothing.
FAKE_PYTHON = '#!/bin/sh\n[ "$2" = pip ] && echo "$@" >>"{log}"\nexit 0\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the script reads, with an environment whose pip only takes notes."""
    for name in ("scripts", "requirements", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(log=tmp_path / "pip.log"))
    python.chmod(0o755)
    return tmp_path


def setup(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("ACCELERATOR", "PYTHON", "TORCH_CPU_INDEX")}
    command = ["bash", str(tree / "scripts" / "setup_env.sh")]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=False, timeout=60)


def pip_calls(tree: Path) -> list[str]:
    log = tree / "pip.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line for line in lines if "install" in line and "--dry-run" not in line]


def test_no_python(tree: Path) -> None:
    shutil.rmtree(tree / ".venv")
    done = setup(tree, PYTHON="no-such-python", ACCELERATOR="cpu")
    assert done.returncode == 1
    assert "Python 3.11 or 3.12 is needed; tried: no-such-python" in done.stderr


def test_unknown_accelerator(tree: Path) -> None:
    done = setup(tree, ACCELERATOR="abacus")
    assert (done.returncode, done.stderr) == (1, "joinwise: ACCELERATOR must be cpu or gpu, not 'abacus'\n")


def test_second_run_does_nothing_and_a_change_renews_only_what_it_touches(tree: Path) -> None:
    assert setup(tree, ACCELERATOR="cpu").returncode == 0
    torch, lock, project = pip_calls(tree)
    assert "--no-deps" in torch
    assert torch.endswith("+cpu")
    assert lock.endswith("-r requirements/cpu.lock")
    assert project.endswith("-e .")

    assert setup(tree, ACCELERATOR="cpu").returncode == 0
    assert pip_calls(tree) == []

    for changed in ("pyproject.toml", "kernels/kv_pack/pack.cpp", "setup.py"):
        with (tree / changed).open("a") as stream:
            stream.write("# changed\n")
        assert setup(tree, ACCELERATOR="cpu").returncode == 0
        assert [call.split()[-1] for call in pip_calls(tree)] == ["."]

    # A compiler that comes later builds what was left out.
    done = setup(tree, ACCELERATOR="cpu", CXX="no-such-compiler")
    assert "the native kernels were not built (no C++ compiler)" in done.stdout
    assert len(pip_calls(tree)) == 1
    assert setup(tree, ACCELERATOR="cpu").returncode == 0
    assert len(pip_calls(tree)) == 1

    with (tree / "requirements" / "cpu.lock").open("a") as stream:
        stream.write("# changed\n")
    assert setup(tree, ACCELERATOR="cpu").returncode == 0
    assert len(pip_calls(tree)) == 3


@pytest.mark.parametrize(("listed", "lock"), [("GPU 0: NVIDIA Test (UUID: x)", "gpu"), ("", "cpu")])
def test_the_build_follows_the_device(tree: Path, listed: str, lock: str) -> None:
    smi = tree / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f'#!/bin/sh\necho "{listed}"\n')
    smi.chmod(0o755)
    assert setup(tree, PATH=f"{smi.parent}:{os.environ['PATH']}").returncode == 0
    assert any(call.endswith(f"-r requirements/{lock}.lock") for call in pip_calls(tree))


def test_failed_installation_is_tried_again(tree: Path) -> None:
    python = tree / ".venv" / "bin" / "python"
    working = python.read_text()
    python.write_text('#!/bin/sh\n[ "$3" = install ] && { echo "no such version" >&2; exit 1; }\nexit 0\n')
    assert setup(tree, ACCELERATOR="gpu").returncode != 0
    python.write_text(working)
    assert setup(tree, ACCELERATOR="gpu").returncode == 0
    assert len(pip_calls(tree)) == 2


def test_script_is_plain_bash() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts/setup_env.sh")], check=False).returncode == 0
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=False).returncode == 0
    assert sys.version_info[:2] in ((3, 11), (3, 12))
