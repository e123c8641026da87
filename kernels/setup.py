"""The ops alone, as the distribution cmt-kernels. Its sources are ../csrc in the repository, csrc beside this file in an sdist.

cmt-fast carries the same package in a folder of its own, which Python looks into last: either may come and go without the other.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
found = importlib.util.spec_from_file_location("wheel", ROOT / "cmt_kernels/_native/wheel.py")
wheel = importlib.util.module_from_spec(found)
found.loader.exec_module(wheel)


class Sdist(sdist):
    """With the sources of the library, which stand beside this folder in the repository."""

    def make_release_tree(self, base_dir, files) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(wheel.native.CSRC, Path(base_dir, "csrc"), dirs_exist_ok=True)


setup(
    packages=find_packages(str(ROOT), include=["cmt_kernels*"]),
    ext_modules=[Extension("cmt_kernels._native.cmt_native", [])],
    setup_requires=wheel.declared(),
    cmdclass=wheel.commands() | {"sdist": Sdist},
)
