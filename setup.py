# SPDX-License-Identifier: BSD-3-Clause
"""Builds the extension with ninja, or says why not and installs the pure-Python package.

What is compiled, and with which flags, is in tools/extension_build.py.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

import extension_build  # noqa: E402


class NinjaBuild(build_ext):
    """build_ext whose modules are made by one ninja file."""

    def run(self) -> None:
        try:
            # A checkout that is worked in also gets the emulated kernels, for its tests.
            plan = extension_build.resolve(ROOT, emulated=self.inplace)
        except extension_build.CannotBuild as reason:
            if extension_build.cuda_build.required():
                raise SystemExit(f"resnet_fast: RESNET_FAST_BUILD_CUDA=1: {reason}") from None
            print(f"resnet_fast: installing the pure-Python package (reference): {reason}")
            self.extensions = []
            return
        print(plan.describe())
        target = Path(self.build_lib) / "resnet_fast"
        if self.inplace:
            target = ROOT / "resnet_fast"
        # NOTE: not self.build_temp: pip gives each build a new one, and nothing would be re-used.
        extension_build.build(plan, ROOT, ROOT / "build" / "ninja", target.absolute())

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # The names only mark the package as one with binaries; NinjaBuild makes the files.
    ext_modules=[Extension("resnet_fast._kernels", []), Extension("resnet_fast._build_info", [])],
    cmdclass={"build_ext": NinjaBuild},
)
