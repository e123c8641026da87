"""The native library in an install: what setup.py of either distribution does. Loaded by its path, as torch may be missing.

A wheel with the library is tagged for its platform and for any Python 3, as the library links to none; one without is for any
platform. What could not be built is said when pip is asked (`-v`), and when a run starts.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
found = importlib.util.spec_from_file_location("build_native", HERE / "build.py")
assert found and found.loader
native = importlib.util.module_from_spec(found)
found.loader.exec_module(native)


class BuildNative(build_ext):
    """Compile csrc with build.py beside this file; an install without a compiler succeeds and says so."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        print(native.build(native.HERE if in_place else Path(self.build_lib, "cmt_kernels/_native").absolute())[1])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        """What an sdist needs besides the packages: files of the folder of setup.py alone."""
        files = [p for p in sorted(native.CSRC.rglob("*")) if p.is_file()]
        return [os.path.relpath(p) for p in files if p.is_relative_to(Path.cwd())]


class Wheel(bdist_wheel):
    """Tagged by what is in it."""

    def run(self) -> None:
        self.run_command("build")
        library = Path(self.get_finalized_command("build").build_lib, "cmt_kernels/_native", native.LIBRARY)
        self.root_is_pure = not library.exists()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any") if self.root_is_pure else ("py3", "none", super().get_tag()[2])


def declared() -> list[str]:
    """The torch that an isolated build is to install for itself, as CMT_BUILD_TORCH says; none unless it does."""
    asked = os.environ.get("CMT_BUILD_TORCH")
    return [asked] if asked else []


def installed(distribution: str) -> list[Path]:
    """The folders of what pip wrote of a distribution in the environment that is installed into."""
    return [folder for place in native.outer() for folder in place.glob(f"{distribution}-*.dist-info")]
