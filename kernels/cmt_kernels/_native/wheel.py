"""The native library in an install: what setup.py of either distribution does. Loaded by its path, as torch may be missing.

A wheel with the library is tagged for its platform and for any Python 3, as the library links to none; one without is for any
platform. What could not be built is said when pip is asked (`-v`), and when a run starts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

from setuptools import Command
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
found = importlib.util.spec_from_file_location("build_native", HERE / "build.py")
assert found and found.loader
native = importlib.util.module_from_spec(found)
found.loader.exec_module(native)

ABOUT = "The ops that cmt-fast carries. A distribution cmt-kernels, where one is installed, is taken before them.\n"


class Modules(build_py):
    """The packages in an empty folder: what an earlier build left there, a library above all, is in no wheel.

    carried: the folder of a wheel that cmt_kernels goes to, and a .pth file names it; "" for its usual place. Python looks
    into such a folder last, so a distribution cmt-kernels is taken before it wherever there is one, and both own no file alike.
    """

    carried = ""

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if self.carried:
            folder = Path(self.build_lib, self.carried)
            folder.mkdir()
            Path(self.build_lib, "cmt_kernels").rename(folder / "cmt_kernels")
            (folder / "ABOUT.txt").write_text(
                ABOUT
            )  # a folder without a file of its own would outlive its distribution
            folder.with_suffix(".pth").write_text(f"{self.carried}\n")


class Native(build_ext):
    """Compile csrc with build.py beside this file; an install without a compiler succeeds and says so."""

    carried = ""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        print(native.build(native.HERE if in_place else self.folder().absolute())[1])

    def folder(self) -> Path:
        """Where the library is built for a wheel."""
        return Path(self.build_lib, self.carried, "cmt_kernels", "_native")

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
        self.skip_build = True
        self.root_is_pure = not (self.get_finalized_command("build_ext").folder() / native.LIBRARY).exists()
        if self.root_is_pure:  # else what has an extension by its name is put where files of a platform go
            self.distribution.ext_modules = []
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any") if self.root_is_pure else ("py3", "none", super().get_tag()[2])


def commands(carried: str = "") -> dict[str, type[Command]]:
    """What setup.py is to build by; carried: see Modules."""
    placed = {"carried": carried}
    return {
        "build_py": type("Modules", (Modules,), placed),
        "build_ext": type("Native", (Native,), placed),
        "bdist_wheel": Wheel,
    }


def declared() -> list[str]:
    """The torch that an isolated build is to install for itself, as CMT_BUILD_TORCH says; none unless it does."""
    asked = os.environ.get("CMT_BUILD_TORCH")
    return [asked] if asked else []


def description(readme: Path) -> str:
    """A README for a page elsewhere, where pictures and links by a path of the repository lead nowhere: links as their words."""
    text = re.sub(r"<!--.*?-->\n?", "", readme.read_text("utf-8"), flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\((?!https://)[^)]*\)\n*", "", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https://)[^)]*\)", r"\1", text)
