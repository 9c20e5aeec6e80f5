"""The native library: built where a compiler is at hand, done without where none is, never one of other sources."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from joinwise.kernels import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def load_again() -> Iterator[None]:
    """Each test loads the library itself, and leaves the next one to."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def copy_tree(target: Path) -> Path:
    """Copy what the build reads."""
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("actors", "cluster", "proto"):
        (target / name).symlink_to(ROOT / name)
    return target


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree without a library."""
    return copy_tree(tmp_path)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A tree with its library, and what the build left in the kernels' folder."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    tree = copy_tree(tmp_path_factory.mktemp("built"))
    return tree, build(tree)


def build(tree: Path, **variables: str) -> list[Path]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=os.environ | variables, check=True, capture_output=True, timeout=100)
    return list((tree / "kernels").glob("_native*"))


def test_builds_where_python_says_and_loads(
    built_once: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, (built,) = built_once
    monkeypatch.setattr(native, "_folder", tree / "kernels")
    opened = native.library()
    assert opened is not None
    assert opened._name == str(built)
    assert native.library() is opened


def test_without_a_compiler_the_build_succeeds_and_the_reference_stands_in(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert build(tree, CC="false", CXX="false") == []
    monkeypatch.setattr(native, "_folder", tree / "kernels")
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
        assert native.library() is None
    (said,) = caplog.messages
    assert "was not built; falling back to the references, tens of times slower" in said
    assert "`make env`" in said


def test_a_library_of_other_sources_is_never_called(
    tree: Path,
    built_once: tuple[Path, list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copy(built_once[1][0], tree / "kernels")
    with (tree / "kernels" / "kv_pack" / "pack.cpp").open("a") as stream:
        stream.write("// changed\n")
    monkeypatch.setattr(native, "_folder", tree / "kernels")
    assert native.library() is None
    assert "was built from other sources" in caplog.text


def test_what_is_no_library_is_never_called(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_folder", tree / "kernels")
    suffix = native.sysconfig.get_config_var("EXT_SUFFIX")
    (tree / "kernels" / f"_native{suffix}").write_bytes(b"\x7fELF, or so it says")
    assert native.library() is None
    assert "falling back" in caplog.text


def test_every_source_counts(tree: Path) -> None:
    folder = tree / "kernels"
    before = native.digest(folder)
    for source in (*native.sources(folder), *native.headers(folder)):
        text = source.read_text()
        source.write_text(text + "//")
        assert native.digest(folder) != before
        source.write_text(text)
    (folder / "kv_pack" / "zzz.cpp").write_text("")
    assert native.digest(folder) != before


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_this_environment_has_it() -> None:
    """`make env` builds it; the tests of the kernels would otherwise compare the reference with itself."""
    assert isinstance(native.library(), ctypes.CDLL), "run `make env`"
