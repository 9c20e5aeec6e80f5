"""The wheel holds everything: a package or data file that is not listed would vanish from it silently."""

from __future__ import annotations

import shutil
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_ROOTS = ("actors", "cluster", "kernels", "proto")
NOT_SHIPPED = {"proto/buf.image.binpb"}  # guards the contract in the repository only
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def source_files() -> list[Path]:
    """Every file under the four roots, relative to the repository."""
    found = [file for root in PACKAGE_ROOTS for file in (ROOT / root).rglob("*") if file.is_file()]
    built = (".pyc", ".so")
    hidden = [file for file in found if "__pycache__" in file.parts or file.suffix in built or file.name[0] == "."]
    relative = [file.relative_to(ROOT) for file in found if file not in set(hidden)]
    return sorted(file for file in relative if file.as_posix() not in NOT_SHIPPED)


def test_every_folder_with_modules_is_a_listed_package() -> None:
    folders = {".".join(("joinwise", *file.parent.parts)) for file in source_files() if file.suffix == ".py"}
    listed = set(SETUPTOOLS["packages"]) - {f"joinwise.{root}" for root in PACKAGE_ROOTS}
    missing = folders - set(SETUPTOOLS["packages"])
    assert not missing, f"add to [tool.setuptools] packages in pyproject.toml: {sorted(missing)}"
    assert listed <= folders, f"listed, but without a module: {sorted(listed - folders)}"


def test_list_of_packages_is_sorted() -> None:
    assert SETUPTOOLS["packages"] == sorted(set(SETUPTOOLS["packages"]))


@pytest.mark.parametrize("root", PACKAGE_ROOTS)
def test_roots_are_namespace_packages(root: str) -> None:
    """With an `__init__.py` the repository's folder would shadow other projects' top-level `kernels` and `proto`."""
    assert not (ROOT / root / "__init__.py").exists()


def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    missing = [file.as_posix() for file in source_files() if f"joinwise/{file.as_posix()}" not in shipped]
    assert not missing, f"not in the wheel; see [tool.setuptools.package-data]: {missing}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="the wheel has native kernels where g++ is at hand")
def test_wheel_holds_the_native_kernels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        built = [name for name in archive.namelist() if name.startswith("joinwise/kernels/_native")]
    assert len(built) == 1


def test_wheel_takes_no_top_level_name_but_ours(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        header = Parser().parsestr(archive.read(metadata).decode())
    assert {top for top in tops if not top.endswith(".dist-info")} == {"joinwise"}
    assert header["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_lock_satisfies_what_the_package_asks_for(kind: str) -> None:
    """The environment is installed without resolving: the lock itself has to fit."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["engine"], *extras[kind], *extras["dev"]]
    lines = (ROOT / f"requirements/{kind}.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line.removesuffix("\\")) for line in lines if line and line[0] not in "# "]  # less the hashes
    locked = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    for requirement in map(Requirement, wanted):
        if requirement.name == "joinwise":
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements/{kind}.lock; run `make lock`"
        assert requirement.specifier.contains(version), f"{requirement} against {version}; run `make lock`"


def test_cpu_lock_leaves_out_what_breaks_beside_a_cpu_torch() -> None:
    lock = (ROOT / "requirements/cpu.lock").read_text(encoding="utf-8")
    assert not [name for name in ("torchvision", "torchaudio", "torchcodec") if f"\n{name}=" in lock]
