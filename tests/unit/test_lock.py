"""The locks pin every file that may be installed, and `scripts/lock.py` chooses those files rightly."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.tags import Tag

ROOT = Path(__file__).parents[2]
LOCKS = ["cpu", "gpu", "docs"]
HASH = r"--hash=sha256:[0-9a-f]{64}"


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


lock = module("scripts/lock.py")


@pytest.mark.parametrize("kind", LOCKS)
def test_every_package_has_hashes_and_nothing_else(kind: str) -> None:
    text = (ROOT / f"requirements/{kind}.lock").read_text(encoding="utf-8")
    header, _, body = text.partition("\n")
    assert header.startswith("# The ") and "://" not in text
    pin = rf'[a-z0-9-]+={{2,3}}[^\s;]+( ; platform_machine == "x86_64")?( \\\n    {HASH})+\n'
    assert re.fullmatch(f"({pin})+", body)
    assert len(lock.locked(ROOT / f"requirements/{kind}.lock")) == body.count("==") - body.count(" == ")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_lock_without_tools_keeps_whole_entries(kind: str) -> None:
    """What an image is installed from: each package that stays keeps its hashes, no hash stays without its package."""
    runtime = module("deploy/runtime_lock.py").runtime
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    whole = (ROOT / f"requirements/{kind}.lock").read_text(encoding="utf-8")
    left = runtime(project, whole)
    assert re.fullmatch(rf"#.*\n([a-z].*( \\\n    {HASH})+\n)+", left)
    assert "pytest==" not in left and "\nuv==" not in left and "ruff==" not in left
    assert all(entry in whole for entry in re.findall(r"[a-z](?:.*\\\n)+.*\n", left))


@pytest.mark.parametrize("file", ["scripts/setup_env.sh", "deploy/Dockerfile"])
def test_locks_are_installed_with_their_hashes(file: str) -> None:
    lines = [
        line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if "install" in line and " -r " in line
    ]
    assert lines and all("--no-deps --require-hashes -r" in line for line in lines)


@pytest.mark.parametrize(
    ("tag", "good"),
    [
        ("py3-none-any", True),
        ("cp311-cp311-manylinux_2_28_x86_64", True),
        ("cp312-cp312-manylinux2014_aarch64", True),
        ("cp38-abi3-manylinux2014_x86_64", True),
        ("py3-none-linux_x86_64", True),
        ("cp313-abi3-manylinux_2_28_x86_64", False),
        ("cp313-cp313-manylinux_2_28_x86_64", False),
        ("cp310-cp310-manylinux_2_28_x86_64", False),
        ("py2-none-any", False),
        ("cp311-cp311-musllinux_1_2_x86_64", False),
        ("cp311-cp311-manylinux_2_28_s390x", False),
        ("cp311-cp311-macosx_11_0_arm64", False),
        ("cp311-cp311-win_amd64", False),
    ],
)
def test_files_that_fit(tag: str, good: bool) -> None:
    assert lock.fits(Tag(*tag.split("-"))) is good


def file(name: str) -> dict[str, Any]:
    return {"url": f"somewhere/{name}", "hashes": {"sha256": name}}


def test_a_source_is_pinned_where_no_wheel_fits_every_machine() -> None:
    built, pure, source = "a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "a-1-py3-none-any.whl", "a-1.tar.gz"
    other = file("a-1-cp311-cp311-win_amd64.whl")
    assert list(lock.wanted({"wheels": [file(built), other], "sdist": file(source)})) == [built, source]
    assert list(lock.wanted({"wheels": [file(built), file(pure)], "sdist": file(source)})) == [built, pure]
    assert list(lock.wanted({"wheels": [file(built)]})) == [built]
    assert list(lock.wanted({"sdist": file(source)})) == [source]
    assert list(lock.wanted({"wheels": [other]})) == []


def test_a_package_with_nothing_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **_: Any) -> None:
        wheel = "{ url = 'x/{}', hashes = { sha256 = 'ab' } }"
        rows = [("good", "good-1-py3-none-any.whl"), ("bad", "bad-1-cp311-cp311-win_amd64.whl")]
        packages = [f"[[packages]]\nname = '{name}'\nwheels = [{wheel.replace('{}', path)}]\n" for name, path in rows]
        Path(command[command.index("-o") + 1]).write_text("".join(packages))

    monkeypatch.setattr(lock.subprocess, "run", answer)
    with pytest.raises(SystemExit, match=r"^nothing to install for bad$"):
        lock.hashes(["good==1", "bad==1"])
