"""The assembler is the newest at hand that has no known fault, what a user set stays, and a bad one keeps wgmma kernels out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cmt_kernels import _op, assembler, available

from cmt_fast.cli import doctor
from cmt_fast.runtime import machine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SCRIPT = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{version}" && exit 0
case "$1" in {refuses}) exit 255;; esac
exit 0
"""
Plant = Callable[..., Path]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Plant]:
    """Write a file that calls itself a ptxas of some version; nothing else is at hand, and no choice has been made."""
    packages = {"triton": [tmp_path / "triton"], "nvidia": [tmp_path / "nvidia"]}
    monkeypatch.setattr(assembler, "_package", lambda name: packages.get(name, []))
    monkeypatch.setattr(assembler, "_chosen", {})
    monkeypatch.setattr(assembler, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setattr(_op, "_resolved", {device: {op: [] for op in _op.OPS} for device in _op.DEVICES})
    for name in (*assembler.VARIABLES, assembler.OURS, "CUDA_HOME", "CUDA_PATH", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/bin:/usr/bin")

    def planted(where: str, version: str, refuses: str = "nothing") -> Path:
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        release = version.rsplit(".", 1)[0]
        path.write_text(SCRIPT.format(log=f"{path}.log", release=release, version=version, refuses=refuses))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    yield planted
    assembler._set(None)


OWN, BLACKWELL = "triton/backends/nvidia/bin/ptxas", "triton/backends/nvidia/bin/ptxas-blackwell"
CU12, CU13 = "nvidia/cuda_nvcc/bin/ptxas", "nvidia/cu13/bin/ptxas"


@pytest.mark.parametrize("where", [BLACKWELL, CU12, CU13, "toolkit/bin/ptxas", "home/bin/ptxas", "path/ptxas"])
def test_the_newest_is_found_wherever_it_lies(plant: Plant, where: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/bin:/usr/bin")
    plant(OWN, "12.8.93")
    newest = plant(where, "13.4.59")
    choice = assembler.choose(90)
    assert choice.assembler.path == str(newest) and choice.assembler.version == (13, 4, 59)
    assert choice.why == "of 2 at hand" and assembler.refusal(90) is None
    assert {os.environ[name] for name in assembler.VARIABLES} == {str(newest)}
    assert assembler.used(90).path == str(newest)


def test_each_is_asked_for_its_version_once(plant: Plant) -> None:
    paths = [plant(OWN, "12.8.93"), plant(CU13, "13.3.33")]
    assembler.choose(90), assembler.choose(90), assembler.candidates(), assembler.refusal(90)
    asked = [Path(f"{path}.log").read_text(encoding="utf-8").splitlines() for path in paths]
    assert [lines.count("--version") for lines in asked] == [1, 2]  # the second time by Triton, of the one it runs
    assert len(asked[0]) == 1 and sum("sm_90a" in line for line in asked[1]) == 1


def test_order_of_preference() -> None:
    versions = [(13, 0, 88), (12, 9, 86), (12, 8, 93), (13, 5, 37), (13, 1, 80), (13, 3, 33), (12, 6, 85)]
    found = [assembler.Assembler(f"/{v}", v, "here") for v in versions]
    ordered = [a.version[:2] for a in assembler.preferred(found)]
    assert ordered == [(13, 5), (13, 3), (13, 1), (12, 9), (13, 0), (12, 6), (12, 8)]
    assert [v for v in versions if assembler.wgmma_fault(v)[1]] == [(12, 8, 93)]


def test_one_that_does_not_know_the_card_is_passed_over(plant: Plant) -> None:
    old = plant(OWN, "12.9.86")
    plant(CU13, "13.5.37", refuses="--gpu-name=sm_90a")
    assert assembler.choose(90).assembler.path == str(old)


def test_what_runs_nothing_is_no_candidate(plant: Plant, tmp_path: Path) -> None:
    plant(OWN, "12.9.86")
    plant(CU13, "13.5.37").write_text("not a program")
    plant(CU12, "13.5.37").write_text("#!/bin/sh\necho nothing of use\n")
    assert [a.version for a in assembler.candidates()] == [(12, 9, 86)]


@pytest.mark.parametrize("name", assembler.VARIABLES)
def test_what_a_user_set_is_never_overridden(plant: Plant, name: str, monkeypatch, tmp_path: Path) -> None:
    plant(CU13, "13.4.59")
    mine = plant("mine/ptxas", "12.8.93")
    monkeypatch.setenv(name, str(mine))
    choice = assembler.choose(90)
    assert os.environ[name] == str(mine)
    reads = assembler.used(90).path == str(mine)  # of the two variables Triton reads one for this card
    assert (choice.assembler.version == (12, 8, 93)) == reads == (choice.why == f"as {name} says")
    assert (assembler.refusal(90) is None) != reads


def test_a_wish_that_is_the_best_outlives_a_switch(plant: Plant, monkeypatch) -> None:
    best = plant(CU13, "13.4.59")
    for name in assembler.VARIABLES:
        with monkeypatch.context() as patch:
            patch.setattr(assembler, "_chosen", {})
            patch.setenv(name, str(best))
            assert assembler.choose(90).assembler.path == str(best)
            assembler.choose(80)
            assert [os.environ.get(v) for v in assembler.VARIABLES if v == name] == [str(best)]
            assert not any(os.environ.get(v) for v in assembler.VARIABLES if v != name)


def test_a_variable_that_names_nothing_is_said(plant: Plant, monkeypatch) -> None:
    plant(CU13, "13.4.59")
    for name in assembler.VARIABLES:
        monkeypatch.setenv(name, "/nowhere/ptxas")
    assert assembler.choose(90).why.endswith("names none that runs")


def test_a_bad_one_keeps_attention_out_and_no_other_op(plant: Plant, monkeypatch) -> None:
    plant(OWN, "12.8.93")
    monkeypatch.setattr(assembler, "card", lambda: 90)
    assert "triton" not in available("attention", "cuda") and "triton" in available("gelu", "cuda")
    with _op.use("attention:triton"), pytest.raises(RuntimeError) as error:
        _op._resolve("attention", "cuda")
    reason = str(error.value)
    assert "ptxas 12.8.93 of triton reads registers that nothing wrote" in reason and "\n" not in reason
    assert "nvidia-cuda-nvcc>=13.3" in reason


@pytest.mark.parametrize("card", [80, 100, None])
def test_without_wgmma_triton_keeps_its_own(plant: Plant, monkeypatch, card: int | None) -> None:
    plant(CU13, "12.8.93")
    monkeypatch.setattr(assembler, "card", lambda: card)
    assert "triton" in available("attention", "cuda") and not any(os.environ.get(v) for v in assembler.VARIABLES)
    assert assembler.choose(card).why == "Triton's own choice" and "backends" in assembler.used(card or 90).path


def test_compilers_for_several_cards_switch(plant: Plant) -> None:
    newest = plant(CU13, "13.4.59")
    own = assembler.choose(80).assembler.path
    for _ in range(2):
        assert assembler.choose(90).assembler.path == assembler.used(90).path == str(newest)
        assert assembler.choose(80).assembler.path == assembler.used(80).path == own != str(newest)


def test_a_child_process_does_not_take_it_for_a_wish(plant: Plant, monkeypatch) -> None:
    plant(CU13, "13.4.59")
    assembler.choose(90)
    monkeypatch.setattr(assembler, "_chosen", {})  # as in a child: nothing but the environment is inherited
    assert assembler.choose(90).why == "of 1 at hand"
    assert assembler.choose(80).why == "Triton's own choice" and "backends" in assembler.used(80).path


def test_dispatch_chooses_before_it_loads_triton_kernels_for_a_gpu(plant: Plant, monkeypatch) -> None:
    plant(OWN, "13.4.59")
    assert available("gelu", "cpu") and not assembler._chosen
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available("gelu", "cuda") and not assembler._chosen
    monkeypatch.setenv("TRITON_INTERPRET", "")
    assert available("gelu", "cuda") and assembler._chosen


def test_nothing_compiled_by_another_one_is_reused(plant: Plant) -> None:
    """Triton keeps cubins under the assembler's version, and asks for that once: a choice after that must be seen."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    before = backend.hash()
    plant(CU13, "13.9.9")
    assembler.choose(90)
    assert backend.hash() != before and "V13.9.9" in backend.hash()


def test_it_is_printed_and_stored(plant: Plant, monkeypatch, capsys) -> None:
    plant(OWN, "12.8.93")
    newest = plant(CU13, "13.4.59")
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(assembler, "card", lambda: 90)
    assert machine.environment()["assembler"] == "ptxas 13.4.59 of nvidia-cuda-nvcc, of 2 at hand"
    doctor._assemblers()
    assert f"ptxas      13.4.59 at {newest} (for sm_90, of 2 at hand)" in capsys.readouterr().out


def test_doctor_says_why_attention_has_no_triton(plant: Plant, monkeypatch, capsys) -> None:
    plant(OWN, "12.8.93")
    monkeypatch.setattr(assembler, "card", lambda: 90)
    doctor._assemblers()
    assert "nothing wrote in wgmma kernels" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("ptxas"), reason="no CUDA toolkit on the PATH")
def test_a_real_one_is_read_and_assembles(monkeypatch) -> None:
    path = shutil.which("ptxas")
    found = assembler.Assembler(path, assembler.version(path), "PATH")
    assert found.version > (11,) and assembler.assembles(found, 90) and not assembler.assembles(found, 91)
