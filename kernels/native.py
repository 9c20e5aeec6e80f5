"""The compiled half of the kernels: one shared library, built with the package where a C++ compiler is at hand.

`setup.py` compiles `native.cpp` and `*/*.cpp` into `_native.*.so` beside this module. It has a plain C interface and is
called through ctypes, which releases the GIL for the length of a call. Only the standard library is imported here:
`setup.py` runs this file too.
"""

import ctypes
import functools
import hashlib
import logging
import sysconfig
import threading
from pathlib import Path

_log = logging.getLogger(__name__)
_folder = Path(__file__).parent
_loading = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built or cannot be used; the first such call says so in the log.

    Callers declare `argtypes` and `restype` of their own functions, once.
    """
    with _loading:
        return _load()


def sources(folder: Path = _folder) -> list[Path]:
    """What the library is compiled from, in a fixed order."""
    return [folder / "native.cpp", *sorted(folder.glob("*/*.cpp"))]


def headers(folder: Path = _folder) -> list[Path]:
    """What the sources include."""
    return sorted(folder.glob("*/*.h"))


def digest(folder: Path = _folder) -> str:
    """Digest of all of them: compiled into the library, so that an old one is never called in a new one's way."""
    files = [*sources(folder), *headers(folder)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


@functools.cache
def _load() -> ctypes.CDLL | None:
    path = _folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        return _open(path)
    except OSError as error:
        reason = str(error) if path.exists() else f"{path.name} was not built"
    _log.warning(
        "native kernels: %s; falling back to the references, tens of times slower. "
        "Install a C++ compiler (g++) and run `make env`, or install joinwise again.",
        reason,
    )
    return None


def _open(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    try:
        opened.joinwise_native_sources.restype = ctypes.c_char_p
        built_from = opened.joinwise_native_sources().decode()
    except AttributeError:
        built_from = "unknown"
    if built_from != (wanted := digest(path.parent)):
        raise OSError(f"{path.name} was built from other sources ({built_from}) than those beside it ({wanted})")
    return opened
