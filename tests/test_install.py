"""What an install brings: where torch is found, tags, one owner of every file, no stale library, completion. Whole installs in
fresh environments take minutes each; CONTRIBUTING.md says how they are done by hand."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cmt_kernels
import pytest
import torch
from cmt_kernels import _native, use, without_native
from cmt_kernels._native import build
from torch.func import jvp

from cmt_fast.cli import doctor
from cmt_fast.runtime import machine
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
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda kind, vars=None: str(tmp_path / "isolated"))
    return site


def test_torch_is_found_around_an_isolated_build(environment, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.Failed, match="CMT_BUILD_TORCH"):
        build.torch_folder()
    (environment / "torch" / "include").mkdir(parents=True)
    with pytest.raises(build.Failed):  # headers alone link nothing
        build.torch_folder()
    (environment / "torch" / "lib").mkdir()
    (environment / "torch" / "version.py").write_text("__version__ = '2.10.1+cu128'\n")
    with pytest.raises(build.Failed, match=r"torch 2\.10 is there, and 2\.11 is the oldest"):
        build.torch_folder()
    (environment / "torch" / "version.py").write_text("from x import y\n__version__ = '2.11.0+cpu'\n")
    assert build.torch_folder() == environment / "torch"


def test_the_environment_is_found_where_a_tool_builds_in_another(environment, monkeypatch):
    """uv sets VIRTUAL_ENV to the environment that it builds in; an activated one stays on PATH."""
    home = environment.parents[2]
    monkeypatch.setenv("VIRTUAL_ENV", str(home / "of-the-build"))
    monkeypatch.setenv("PATH", os.pathsep.join((str(home / "of-the-build" / "bin"), str(home / "bin"), "")))
    monkeypatch.chdir(home)
    assert environment not in build.outer()  # a folder on PATH is no environment
    (home / "pyvenv.cfg").write_text("home = /usr/bin\n")
    assert environment in build.outer()
    monkeypatch.setenv("PATH", "")
    home.joinpath("src").mkdir()
    monkeypatch.chdir(home / "src")
    assert environment not in build.outer()
    (home / "src" / ".venv").symlink_to(home)  # what uv takes where none is activated
    assert environment in [place.resolve() for place in build.outer()]


def test_what_cannot_be_built_leaves_no_older_library(tmp_path, monkeypatch):
    (tmp_path / build.LIBRARY).write_bytes(b"of other sources")
    monkeypatch.setattr(build, "compiler", lambda: None)
    built, line = build.build(tmp_path)
    assert not built and "no C++ compiler" in line and not (tmp_path / build.LIBRARY).exists()
    assert json.loads((tmp_path / build.RECORD).read_text())["line"].startswith("not built")


def test_a_library_that_is_not_of_its_record_or_sources_is_not_loaded(tmp_path, monkeypatch):
    record, library = tmp_path / "build.json", tmp_path / "cmt_native.so"
    library.write_bytes(b"one")
    monkeypatch.setattr(_native, "RECORD", record)
    monkeypatch.setattr(_native, "LIBRARY", library)
    monkeypatch.delenv("CMT_NATIVE_LIBRARY", raising=False)
    own, now = build.checksum(library), build.sources()
    for made, expected in (
        ({"sources": now, "library": own}, "does not load"),  # it is tried, and is no library
        ({"sources": "0" * 16, "library": own}, "other sources than those now in"),
        ({"sources": now, "library": "0" * 16}, "is not the library that build.json"),
        ({}, "is not the library that build.json"),  # of a version that kept no such record
    ):
        record.write_text(json.dumps({"line": "built", **made}))
        said = _native._load.__wrapped__()
        assert expected in said, said
        assert ("python -m cmt_kernels._native.build" in said) is (_native.stale() is not None)
    monkeypatch.setattr(_native, "CSRC", tmp_path / "none")  # an installed package has no sources to compare with
    record.write_text(json.dumps({"sources": "0" * 16, "library": own}))
    assert _native.stale() is None


def test_a_start_says_once_which_ops_are_not_native_and_why(monkeypatch):
    monkeypatch.setattr(_native, "unavailable", lambda device: "no C++ compiler")
    line = without_native("cpu")
    assert line.startswith("no native ops: no C++ compiler. Instead: gated_residual ") and line.count("\n") == 0
    with use("reference"):  # asked for
        assert without_native("cpu") is None
    monkeypatch.setattr(_native, "unavailable", lambda device: None)
    assert without_native("cpu") is None


def test_ops_of_another_version_are_told(monkeypatch):
    assert machine.other_kernels() is None
    monkeypatch.setattr(cmt_kernels, "__version__", "9.9")
    assert "cmt-kernels 9.9 in " in machine.other_kernels()


def test_sources_count_every_file_and_flag(monkeypatch, tmp_path):
    shutil.copytree(build.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    seen = {build.sources()}
    for name in ("ops.cpp", "row_math.h", "cuda/gelu.cu", "cuda/row.cuh"):
        with open(tmp_path / "csrc" / name, "a", encoding="utf-8") as file:
            file.write("\n")
        seen.add(build.sources())
    monkeypatch.setattr(build, "CXX_FLAGS", ["-O0"])
    assert len(seen | {build.sources()}) == 6


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, tuple[str, dict[str, str]]]:
    """What setup.py makes of a copy of the sources: the wheel's name and its files, those of Python aside by name alone.

    The compiler is a stand-in that writes a word. The last build, of a machine without one, finds what the first left behind.
    """
    home = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "build.json")
    for name in ("cmt_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, home / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, home)
    compiler = home / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho word > "$2"\n')
    compiler.chmod(0o755)
    found = {}
    for key, folder, cxx in (
        ("trainer", home, compiler), ("ops", home / "kernels", compiler), ("bare", home / "kernels", "no-compiler")
    ):  # fmt: skip
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(home / key)]
        environ = {**os.environ, "CXX": str(cxx), "CMT_CUDA": "0"}
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (path,) = (home / key).iterdir()
        with zipfile.ZipFile(path) as wheel:
            found[key] = (
                path.name,
                {n: "" if n.endswith(".py") else wheel.read(n).decode(errors="replace") for n in wheel.namelist()},
            )
    return found


def test_a_wheel_is_tagged_by_what_is_in_it(wheels):
    for key, distribution in (("trainer", "cmt_fast"), ("ops", "cmt_kernels")):
        name, files = wheels[key]
        assert re.fullmatch(rf"{distribution}-[\d.]+-py3-none-linux_\w+\.whl", name), name
        (wheel,) = (text for file, text in files.items() if file.endswith("/WHEEL"))
        assert "Root-Is-Purelib: false" in wheel and "Tag: py3-none-linux" in wheel
        (record,) = (json.loads(text) for file, text in files.items() if file.endswith("/build.json"))
        assert record["line"].startswith("built: CPU") and record["sources"] == build.sources()
    name, files = wheels["bare"]
    assert name.endswith("-py3-none-any.whl") and not [file for file in files if file.endswith(".so")]
    assert files["cmt_kernels/_native/build.json"] == '{"line": "not built: no C++ compiler"}\n'


def test_no_file_is_owned_by_two_distributions(wheels):
    """The trainer's ops lie in a folder of their own, which a .pth file puts last on Python's path."""
    trainer, ops = wheels["trainer"][1], wheels["ops"][1]
    assert not set(trainer) & set(ops)
    assert trainer["cmt_fast_kernels.pth"] == "cmt_fast_kernels\n"
    assert not [file for files in (trainer, ops, wheels["bare"][1]) for file in files if ".data/" in file]
    carried = {file.removeprefix("cmt_fast_kernels/") for file in trainer if file.startswith("cmt_fast_kernels/")}
    assert carried - {"ABOUT.txt"} == {file for file in ops if ".dist-info/" not in file}


def test_links_of_the_readme_lead_somewhere_on_a_page_elsewhere(wheels):
    for key in ("trainer", "ops"):
        (text,) = (text for file, text in wheels[key][1].items() if file.endswith("/METADATA"))
        assert "Description-Content-Type: text/markdown" in text and len(text) > 2000
        assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []


def test_the_extra_all_is_all_that_users_install():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (every,) = extras["all"]
    assert sorted(re.fullmatch(r"cmt-fast\[(.*)\]", every)[1].split(",")) == sorted(set(extras) - {"all", "dev"})
    assert set(doctor.EXTRAS) == set(extras) - {"all", "dev"}


def test_both_distributions_are_of_one_version_and_licence():
    from cmt_fast import __version__

    for file in ("pyproject.toml", "kernels/pyproject.toml"):
        about = tomllib.loads((ROOT / file).read_text())["project"]
        assert about["version"] == __version__ == cmt_kernels.__version__ and about["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "kernels" / "LICENSE").read_bytes()


def test_the_readme_of_the_ops_runs_and_its_tangent_is_right():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.S)
    torch.manual_seed(0)
    world: dict = {}
    exec(compile(code, "kernels/README.md", "exec"), world)
    assert all(w.grad.norm() > 0 for w in world["weights"].values())
    table = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", (ROOT / "kernels" / "README.md").read_text(), re.M)
    folders = {op: ROOT / "kernels" / "cmt_kernels" / op for op in cmt_kernels.OPS}
    assert {op: set(re.findall(r"\w+", names)) for op, names in table} == {
        op: {name for name in ("native", "triton", "torch", "apex") if (folder / f"{name}.py").exists()}
        for op, folder in folders.items()
    }
    u, Dual, r = world["u"], world["Dual"], world["r"].double()
    world["weights"].update({k: w.detach().double() for k, w in world["weights"].items()})
    z, t, v = (world[k].double() for k in "ztv")
    from cmt_kernels import use

    with use("reference"):
        want = jvp(lambda z, t: u(z, r, t), (z, t), (v, torch.ones_like(t)))[1]
        got = u(Dual(z, v), r, Dual(t, torch.ones_like(t))).tangent
    torch.testing.assert_close(got, want)


def test_bash_completes_commands_options_and_recipes(tmp_path):
    """By the line that `cmt completion --help` gives, in a home where nothing is."""
    pytest.importorskip("shtab")
    from cmt_fast import cli
    from cmt_fast.cli.completion import HOW

    script = tmp_path / ".cmt.bash"
    line = HOW["bash"].replace("cmt completion", f"{shlex.join(forked.python())} -m cmt_fast completion", 1)
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", f"set -e; {line}"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".bashrc").read_text() == ". ~/.cmt.bash\n"
    ask = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '$(complete -p cmt | sed "s/.*-F \\([^ ]*\\).*/\\1/"); echo "${COMPREPLY[@]}"'
    )

    (tmp_path / "digraph.yaml").touch()  # one's own
    (tmp_path / "digest.txt").touch()

    def words(*typed: str) -> set[str]:
        command = ["bash", "-c", ask, script, "cmt", *typed]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        return set(out.stdout.split())

    assert words("tr") == {name for name in cli.COMMANDS if name.startswith("tr")}
    assert words("train", "dig") == {"digits", "digits-mf", "digraph.yaml"}
    assert "--dry-run" in words("train", "digits", "--d")
    assert words("ckpt", "ex") == {"export"}


@pytest.mark.parametrize("shell, words", [("zsh", "_files -g '*.yaml'"), ("fish", "__fish_complete_suffix .yaml")])
def test_other_shells_complete_recipes_and_files_of_ones_own(shell, words, capsys):
    """The line of `--help` makes the folder that it writes to: zsh reads fpath alone, and a new home has neither."""
    pytest.importorskip("shtab")
    from cmt_fast.cli import completion, main

    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert words in script and script.count("_cmt_recipe") > 5 and "digits-mf" in script
    folder = re.search(r"> (~/\S+)/", completion.HOW[shell])[1]
    assert completion.HOW[shell].startswith(f"mkdir -p {folder}; cmt completion {shell} > {folder}/")
