"""The wheel without extras: the client SDK, the command line's shell and the router, with no ray, vllm or torch.

The wheel is unpacked beside the files of exactly those distributions that its metadata asks for, followed to the end,
and Python runs isolated from any other site folder. So a dependency that is used but not declared fails here too.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ABSENT = ("ray", "vllm", "torch", "transformers", "numpy", "pytest")
PRELUDE = "import sys; sys.path += {paths!r}; sys.dont_write_bytecode = True\n"


def closure(requirements: list[Requirement]) -> set[str]:
    """Names of all distributions that `requirements` lead to in this environment."""
    todo, seen = list(requirements), set[tuple[str, frozenset[str]]]()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for line in metadata.requires(requirement.name) or []:
            inner = Requirement(line)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The import path of an environment into which only the wheel was installed."""
    home = tmp_path_factory.mktemp("bare")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home / "joinwise")
    (info,) = (home / "joinwise").glob("*.dist-info")
    wanted = [Requirement(line) for line in metadata.PathDistribution(info).requires or []]
    names = closure([r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})])
    site = home / "site"
    for name in sorted(names):
        for file in metadata.files(name) or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                link = site / file
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(file.locate())
    return [str(home / "joinwise"), str(site)]


def run(bare: list[str], code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-c", PRELUDE.format(paths=bare) + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def command_line(bare: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`joinwise ARGUMENTS` as the installed script starts it."""
    code = (
        "from importlib.metadata import entry_points\n"
        "(script,) = entry_points(group='console_scripts', name='joinwise')\n"
        f"sys.argv = ['joinwise', *{list(arguments)!r}]\n"
        "sys.exit(script.load()())\n"
    )
    return run(bare, code)


def test_nothing_heavy_is_there(bare: list[str]) -> None:
    done = run(bare, f"import importlib.util as u; print([n for n in {ABSENT!r} if u.find_spec(n)])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "module", ["joinwise.cluster.client", "joinwise.cluster.cli.main", "joinwise.cluster.router.router"]
)
def test_imports(bare: list[str], module: str) -> None:
    done = run(bare, f"import {module}")
    assert done.returncode == 0, done.stderr


def test_every_module_of_the_control_plane_imports(bare: list[str]) -> None:
    code = (
        "import importlib, pkgutil, joinwise.cluster as c\n"
        "for m in pkgutil.walk_packages(c.__path__, 'joinwise.cluster.'):\n"
        "    importlib.import_module(m.name)\n"
    )
    done = run(bare, code)
    assert done.returncode == 0, done.stderr


def test_help(bare: list[str]) -> None:
    done = command_line(bare, "--help")
    assert done.returncode == 0, done.stderr
    assert "joinwise" in done.stdout


def test_a_command_that_needs_engines_prints_the_install_command(bare: list[str]) -> None:
    done = command_line(bare, "up")
    assert done.returncode != 0
    assert "joinwise[cpu]" in done.stdout + done.stderr
