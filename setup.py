"""Packages of CMT-Fast: the trainer `cmt_fast` and, from its own source root, the ops `cmt_kernels` with their extension.

The extension is built beside a torch. `pip install .` builds in isolation, where none can be imported; then

* CMT_BUILD_TORCH=torch==2.13.0 declares one, which pip installs for the build;
* else that of the environment which pip installs into is taken, by its path (`outer` in cmt_kernels/_native/build.py);
* else the install is pure Python. No torch is downloaded unasked: a CUDA build is gigabytes, and most have it already.

The ops lie in a folder of their own in the wheel, which a .pth file puts at the end of Python's path. So a distribution
cmt-kernels (kernels/README.md) may be there or not, before or after, and no file is ever owned by two.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
found = importlib.util.spec_from_file_location("wheel", ROOT / "kernels/cmt_kernels/_native/wheel.py")
wheel = importlib.util.module_from_spec(found)
found.loader.exec_module(wheel)

setup(
    packages=find_packages(include=["cmt_fast*"]) + find_packages("kernels"),
    package_dir={"cmt_fast": "cmt_fast", "cmt_kernels": "kernels/cmt_kernels"},
    package_data={
        "cmt_fast": [
            "recipes/*.yaml",
            "config/keys.yaml",
            "cost/advice.json",
            "render/templates/*.j2",
            "speedrun/tracks/*",
        ]
    },  # fmt: skip
    long_description=wheel.description(ROOT / "README.md"),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("cmt_kernels._native.cmt_native", [])],
    setup_requires=wheel.declared(),
    cmdclass=wheel.commands(carried="cmt_fast_kernels"),
)
