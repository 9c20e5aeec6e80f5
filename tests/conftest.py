"""What every test shares: a home of its own, timeouts by kind, golden files, the small model and the built wheel."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
PACKAGE_ROOTS = ("actors", "cluster", "kernels", "proto")
# Seconds for one test, by the heaviest thing it starts; a `timeout` marker of its own goes first.
TIMEOUTS = {"cluster": 600, "engine": 600, "model": 600, "slow": 600}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the golden files again instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    """Set before anything of ours is imported: no test asks the network or touches a cluster of the user's."""
    gc.disable()  # until torch and vLLM are there: a million objects that stay
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    home = tempfile.mkdtemp(prefix="joinwise-test-")
    os.environ["JOINWISE_HOME"] = home
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")
        limits = [limit for mark, limit in TIMEOUTS.items() if item.get_closest_marker(mark)]
        if limits and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(max(limits)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


class Golden:
    """`golden(name, content)` compares with `tests/golden/<name>`; with --golden it writes the file instead."""

    def __init__(self, write: bool) -> None:
        self.write = write

    def __call__(self, name: str, content: str | bytes) -> None:
        file = GOLDEN / name
        fresh = content.encode() if isinstance(content, str) else content
        if self.write:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(fresh)
            return
        assert file.exists(), f"{file} is missing; run `make golden` and read the diff"
        kept = file.read_bytes()
        if isinstance(content, str):
            assert content == kept.decode(), f"{name} changed; if that is meant, run `make golden` and read the diff"
        assert fresh == kept, f"{name} changed; if that is meant, run `make golden` and read the diff"


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(bool(request.config.getoption("--golden")))


@pytest.fixture(scope="session")
def small_model() -> Any:
    """The bundled model, converted on first use: a LocalModel."""
    from joinwise.actors.models import resolve_model

    return resolve_model("smollm2-135m-instruct", progress=print)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, so that neither a stale `build/` gets in nor one is left behind."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGE_ROOTS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return built
