"""Packages of CMT-Fast: the trainer `cmt_fast` and, from its own source root, the ops `cmt_kernels` with their extension.

The extension needs torch to build against. Where pip builds in isolation there is none, and the install is pure Python:
`python -m cmt_kernels._native.build` then builds it in place, or `pip install --no-build-isolation` while installing.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class BuildNative(build_ext):
    """Compile csrc with cmt_kernels/_native/build.py; an install without a compiler succeeds and says so."""

    def run(self) -> None:
        if importlib.util.find_spec("torch") is None:
            print("native ops not built: no torch to build against (isolated build)")
            return
        spec = importlib.util.spec_from_file_location("build_native", ROOT / "kernels/cmt_kernels/_native/build.py")
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        in_place = self.inplace or self.editable_mode
        print(native.build(native.HERE if in_place else Path(self.build_lib, "cmt_kernels/_native").absolute())[1])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]


setup(
    packages=find_packages(include=["cmt_fast*"]) + find_packages("kernels"),
    package_dir={"cmt_fast": "cmt_fast", "cmt_kernels": "kernels/cmt_kernels"},
    package_data={"cmt_fast": ["recipes/*.yaml", "config/keys.yaml", "render/templates/*.j2"]},
    ext_modules=[Extension("cmt_kernels._native.cmt_native", [])],
    cmdclass={"build_ext": BuildNative},
)
