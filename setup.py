"""Packages of CMT-Fast: the trainer `cmt_fast` and, from its own source root, the ops `cmt_kernels` with their extension.

The extension is built beside a torch. `pip install .` builds in isolation, where none can be imported; then

* CMT_BUILD_TORCH=torch==2.13.0 declares one, which pip installs for the build;
* else that of the environment which pip installs into is taken, by its path (`outer` in cmt_kernels/_native/build.py);
* else the install is pure Python. No torch is downloaded unasked: a CUDA build is gigabytes, and most have it already.

CMT_WITHOUT_KERNELS=1, or a cmt-kernels in the environment, leaves the ops to that distribution (kernels/README.md): no file
is ever owned by two.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, find_packages, setup

found = importlib.util.spec_from_file_location("wheel", Path(__file__).parent / "kernels/cmt_kernels/_native/wheel.py")
wheel = importlib.util.module_from_spec(found)
found.loader.exec_module(wheel)

asked = os.environ.get("CMT_WITHOUT_KERNELS")
apart = asked == "1" if asked else bool(wheel.installed("cmt_kernels"))
setup(
    packages=find_packages(include=["cmt_fast*"]) + ([] if apart else find_packages("kernels")),
    package_dir={"cmt_fast": "cmt_fast", "cmt_kernels": "kernels/cmt_kernels"},
    package_data={"cmt_fast": ["recipes/*.yaml", "config/keys.yaml", "render/templates/*.j2"]},
    ext_modules=[] if apart else [Extension("cmt_kernels._native.cmt_native", [])],
    setup_requires=wheel.declared(),
    cmdclass={"build_ext": wheel.BuildNative, "bdist_wheel": wheel.Wheel},
)
