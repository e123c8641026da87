"""What an install brings: where torch is found, tags, one owner of every file, no stale library, completion. Whole installs in
fresh environments take minutes each; CONTRIBUTING.md says how they are done by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cmt_kernels import _native
from cmt_kernels._native import build
from torch.func import jvp

from tests.fixtures import forked

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Path:
    """The site-packages of an environment that pip installs into, empty."""
    site = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda kind: str(tmp_path / "isolated"))
    return site


def test_torch_is_found_around_an_isolated_build(environment, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.Failed, match="CMT_BUILD_TORCH"):
        build.torch_folder()
    (environment / "torch" / "include").mkdir(parents=True)
    with pytest.raises(build.Failed):  # headers alone link nothing
        build.torch_folder()
    (environment / "torch" / "lib").mkdir()
    assert build.torch_folder() == environment / "torch"


def test_what_cannot_be_built_leaves_no_older_library(tmp_path, monkeypatch):
    (tmp_path / build.LIBRARY).write_bytes(b"of other sources")
    monkeypatch.setattr(build, "compiler", lambda: None)
    built, line = build.build(tmp_path)
    assert not built and "no C++ compiler" in line and not (tmp_path / build.LIBRARY).exists()
    assert json.loads((tmp_path / build.RECORD).read_text())["line"].startswith("not built")


def test_a_library_of_other_sources_is_not_loaded(tmp_path, monkeypatch):
    record, library = tmp_path / "build.json", tmp_path / "cmt_native.so"
    library.write_bytes(b"")
    monkeypatch.setattr(_native, "RECORD", record)
    monkeypatch.setattr(_native, "LIBRARY", library)
    monkeypatch.delenv("CMT_NATIVE_LIBRARY", raising=False)
    for sources, stale in ((build.sources(), False), ("0" * 16, True)):
        record.write_text(json.dumps({"line": "built", "sources": sources}))
        assert _native.stale() is stale
        said = _native._load.__wrapped__()
        assert said and ("other sources" in said) is stale, said
    monkeypatch.setattr(_native, "CSRC", tmp_path / "none")  # an installed package has no sources to compare with
    assert not _native.stale()


def test_sources_count_every_file_and_flag(monkeypatch, tmp_path):
    shutil.copytree(build.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    seen = {build.sources()}
    for name in ("ops.cpp", "row_math.h", "cuda/gelu.cu", "cuda/row.cuh"):
        with open(tmp_path / "csrc" / name, "a") as file:
            file.write("\n")
        seen.add(build.sources())
    monkeypatch.setattr(build, "CXX_FLAGS", ["-O0"])
    assert len(seen | {build.sources()}) == 6


def setup(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    command = [*forked.python(), "setup.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120
    )


def test_no_file_is_owned_by_two_distributions(environment):
    """cmt-fast leaves the ops to a cmt-kernels that is there; cmt-kernels refuses beside a cmt-fast that carries them."""
    ask = (
        "import setuptools, sys\n"
        "def setup(**k): print('ops' if any(p.startswith('cmt_kernels') for p in k['packages']) else 'apart')\n"
        "setuptools.setup = setup\n"
        "exec(open('setup.py').read(), {'__file__': 'setup.py', '__name__': 'setup'})"
    )

    def said(folder: Path, **environ: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", ask], cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True
        )
        return (done.stdout + done.stderr).strip()

    assert said(ROOT) == "ops" and said(ROOT, CMT_WITHOUT_KERNELS="1") == "apart"
    (environment / "cmt_kernels-0.1.0.dist-info").mkdir()
    assert said(ROOT) == "apart" and said(ROOT, CMT_WITHOUT_KERNELS="0") == "ops"
    record = environment / "cmt_fast-0.1.0.dist-info" / "RECORD"
    record.parent.mkdir()
    record.write_text("cmt_fast/__init__.py,,\n")
    assert said(ROOT / "kernels") == "ops"
    record.write_text("cmt_fast/__init__.py,,\ncmt_kernels/__init__.py,,\n")
    assert "carries these ops already" in said(ROOT / "kernels")


@pytest.mark.parametrize("library", [True, False])
def test_a_wheel_is_tagged_by_what_is_in_it(library, tmp_path):
    """A stand-in for the compiler: the tag comes of whether it left a library."""
    shutil.copytree(ROOT / "kernels" / "cmt_kernels" / "_native", tmp_path / "_native")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "setup.py").write_text(
        "import sys; sys.path.insert(0, '_native'); import wheel_ as wheel\n"
        "def build(into):\n"
        f"    into.mkdir(parents=True, exist_ok=True); {library} and (into / 'cmt_native.so').write_bytes(b'')\n"
        "    return True, ''\n"
        "wheel.native.build = build\n"
        "from setuptools import Extension, setup\n"
        "setup(name='x', version='1', packages=['pkg'], ext_modules=[Extension('cmt_kernels._native.cmt_native', [])],\n"
        "      cmdclass={'build_ext': wheel.BuildNative, 'bdist_wheel': wheel.Wheel})\n"
    )
    (tmp_path / "_native" / "wheel.py").rename(tmp_path / "_native" / "wheel_.py")  # setuptools has a wheel of its own
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (name,) = (p.name for p in (tmp_path / "dist").iterdir())
    assert re.fullmatch(r"x-1-py3-none-linux_\w+\.whl" if library else r"x-1-py3-none-any\.whl", name), name


def test_the_extra_all_is_all_that_users_install():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (every,) = extras["all"]
    assert sorted(re.fullmatch(r"cmt-fast\[(.*)\]", every)[1].split(",")) == sorted(set(extras) - {"all", "dev"})


def test_both_distributions_are_of_one_version_and_licence():
    from cmt_fast import __version__

    for file in ("pyproject.toml", "kernels/pyproject.toml"):
        about = tomllib.loads((ROOT / file).read_text())["project"]
        assert about["version"] == __version__ and about["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "kernels" / "LICENSE").read_bytes()


def test_the_readme_of_the_ops_runs_and_its_tangent_is_right():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.S)
    torch.manual_seed(0)
    world: dict = {}
    exec(compile(code, "kernels/README.md", "exec"), world)
    assert all(w.grad.norm() > 0 for w in world["weights"].values())
    u, Dual, r = world["u"], world["Dual"], world["r"].double()
    world["weights"].update({k: w.detach().double() for k, w in world["weights"].items()})
    z, t, v = (world[k].double() for k in "ztv")
    from cmt_kernels import use

    with use("reference"):
        want = jvp(lambda z, t: u(z, r, t), (z, t), (v, torch.ones_like(t)))[1]
        got = u(Dual(z, v), r, Dual(t, torch.ones_like(t))).tangent
    torch.testing.assert_close(got, want)


def test_bash_completes_commands_options_and_recipes(tmp_path):
    pytest.importorskip("shtab")
    from cmt_fast import cli

    script = tmp_path / "cmt.bash"
    done = subprocess.run([*forked.python(), "-m", "cmt_fast", "completion", "bash"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script.write_text(done.stdout)
    ask = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '$(complete -p cmt | sed "s/.*-F \\([^ ]*\\).*/\\1/"); echo "${COMPREPLY[@]}"'
    )

    def words(*typed: str) -> set[str]:
        out = subprocess.run(["bash", "-c", ask, script, "cmt", *typed], capture_output=True, text=True, timeout=30)
        return set(out.stdout.split())

    assert words("tr") == {name for name in cli.COMMANDS if name.startswith("tr")}
    assert words("train", "dig") == {"digits", "digits-mf"}
    assert "--dry-run" in words("train", "digits", "--d")
    assert words("ckpt", "ex") == {"export"}
