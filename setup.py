"""Builds the native CPU kernels with the package; pyproject.toml holds everything else.

The kernels need a C++ compiler and an installed torch (`pip install --no-build-isolation`). Where
one of them is missing the package is built without: it works, packed layers run in plain torch, and
`nmfx.report` says so.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel

BUILDER = Path(__file__).parent / "nmfx/kernels/cpu/build.py"


class BuildWithKernels(build_py):
    """Compiles the library into the source tree, from where it is copied like any other file."""

    def run(self):
        try:
            runpy.run_path(str(BUILDER))["build"]()
        except RuntimeError as error:
            sys.stderr.write(f"nmfx is built without native kernels: {error}\n")
        super().run()


class PlatformDistribution(Distribution):
    """A package for one kind of machine, as it holds a shared library."""

    def has_ext_modules(self):
        return True


class AnyPython(bdist_wheel):
    """The library has no Python symbols: one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython},
    distclass=PlatformDistribution,
)
