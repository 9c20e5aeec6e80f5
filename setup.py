"""The compiled kernels; everything else about the package is in pyproject.toml.

The extension is optional: without a C++ compiler the installation succeeds, and `joinwise.kernels` falls back to its
references. No -march: the sources pick their instructions when they run, so that a wheel works on every machine.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup

kernels = Path("kernels")
native = runpy.run_path("kernels/native.py")

setup(
    ext_modules=[
        Extension(
            "joinwise.kernels._native",
            sources=[source.as_posix() for source in native["sources"](kernels)],
            depends=[header.as_posix() for header in native["headers"](kernels)],
            define_macros=[("JOINWISE_SOURCES", f'"{native["digest"](kernels)}"')],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-pthread", "-Wall", "-Wextra", "-ffp-contract=off"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]
)
