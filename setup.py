"""Packages of CMT-Fast: the trainer `cmt_fast` and, from its own source root, the ops `cmt_kernels`."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["cmt_fast*"]) + find_packages("kernels"),
    package_dir={"cmt_fast": "cmt_fast", "cmt_kernels": "kernels/cmt_kernels"},
    package_data={"cmt_fast": ["recipes/*.yaml", "templates/*"]},
)
