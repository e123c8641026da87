"""The CUDA sources on a CPU: the tests of the native ops run on csrc/cuda, in two orders of threads, every kernel of it; and the
emulation finds the faults that it is there for.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from cmt_kernels._native import build

from tests.fixtures import forked
from tests.kernels import emulated

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
ORDERS = ("forward", "reverse")


@pytest.fixture(scope="module")
def library() -> Path:
    return emulated.library()


def python(*arguments: str, launches: Path) -> subprocess.CompletedProcess:
    """Python on the emulated library."""
    env = os.environ | emulated.environment() | {"CMT_EMULATED_LAUNCHES": str(launches)}
    return subprocess.run(
        [*forked.python("torch"), *arguments], env=env, capture_output=True, text=True, cwd=emulated.ROOT
    )


def launches(log: Path) -> Counter:
    """How often each kernel was launched; 0 for one that never was."""
    found: Counter = Counter()
    for line in log.read_text(encoding="utf-8").splitlines():
        count, kernel = line.split("\t")
        found[kernel] += int(count)
    return found


def test_the_native_tests_hold_on_the_cuda_sources(library: Path, tmp_path: Path) -> None:
    """In both orders of threads."""
    log, names = tmp_path / "launches", tmp_path / "names"
    options = ["-p", "tests.kernels.both_orders", f"--junitxml={names}"]
    done = python("-m", "pytest", *emulated.NATIVE_TESTS, *options, launches=log)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = launches(log)
    assert len(found) > 50 and not [kernel for kernel, count in found.items() if count < 2]
    ran = [names.read_text().count(f"[{order}") for order in ORDERS]
    assert ran[0] == ran[1] > 350, ran


def test_the_order_of_threads_changes_no_bit(library: Path, tmp_path: Path) -> None:
    """Of any kernel."""
    log = tmp_path / "launches"
    code = f"""
import os
from tests.kernels.test_native_instances import digest
for order in {ORDERS}:
    os.environ["CMT_EMULATED_ORDER"] = order
    print(digest())
"""
    done = python("-c", code, launches=log)
    assert done.returncode == 0, done.stderr
    digests = done.stdout.split()
    assert len(digests) == 2 and digests[0] == digests[1] and len(digests[0]) == 64
    assert not [kernel for kernel, count in launches(log).items() if count < 2]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of planted_kernels.cu."""
    folder = tmp_path_factory.mktemp("planted")
    source = Path(__file__).with_name("planted_kernels.cu")
    (folder / "planted.cpp").write_text(emulated.translated(source.read_text(), str(source)))
    build.run(
        [*emulated.command(folder / "planted.cpp", False)[:-2], str(folder / "planted.cpp"), "-o", str(folder / "run")]
    )
    return folder / "run"


def run(planted: Path, what: str, order: str = "forward") -> subprocess.CompletedProcess:
    env = os.environ | {"CMT_EMULATED_ORDER": order}
    return subprocess.run([planted, what], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(planted: Path, order: str) -> None:
    right, wrong = (run(planted, what, order).stdout.split() for what in ("right", "race"))
    assert right == [str(63 - i) for i in range(64)]
    # what a thread reads before its neighbour wrote it is NaN: the half of them that come first
    assert sum("nan" in x for x in wrong) == 32 and wrong[0 if order == "forward" else 63].endswith("nan")


@pytest.mark.parametrize("order", ORDERS)
def test_a_lane_may_return_after_a_shuffle_and_before_a_barrier(planted: Path, order: str) -> None:
    wanted = [(i ^ 16) + (0 if i % 2 else 0.5) for i in range(32)]
    assert [float(x) for x in run(planted, "early_leavers", order).stdout.split()[:32]] == wanted


def test_shared_memory_is_nan_until_it_is_written(planted: Path) -> None:
    assert all("nan" in x for x in run(planted, "unwritten").stdout.split()[:4])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "what, kernel, said",
    [
        ("barrier_of_half", "barrier_of_half", "a barrier or a shuffle that not all of them reach"),
        ("shuffle_of_half", "shuffle_of_half", "a shuffle after a lane of the warp has returned"),
        ("load", "misaligned", "a misaligned access of 16 bytes"),
        ("store", "misaligned", "a misaligned access of 16 bytes"),
    ],
)
def test_what_hangs_or_faults_on_a_gpu_stops_the_process(
    planted: Path, what: str, kernel: str, said: str, order: str
) -> None:
    done = run(planted, what, order)
    assert (
        done.returncode == -signal.SIGABRT
        and f"kernel {kernel}, block (0, 0, 0)" in done.stderr
        and said in done.stderr
    )


def test_a_launch_that_a_gpu_refuses_is_refused(planted: Path) -> None:
    assert run(planted, "launches").stdout.split() == ["0", "9", "0", "9", "0", "9", "9", "0", "1"]


def test_maths_overflow_as_on_a_gpu(planted: Path) -> None:
    """exp is infinite from 88.72 on; 1 / y is 0 from beyond 2^126 on, and an infinite x over such a y NaN."""
    values = run(planted, "maths").stdout.split()
    assert (
        values[:3] == ["inf", "0", "1"] and values[3].endswith("nan") and values[4] == "inf" and float(values[5]) == 0
    )


def test_what_is_not_understood_raises() -> None:
    for text in ("__shared__ int4 (*pointers)[2];", "kernel<a<b>, c><<<1, 1>>>(x);"):
        with pytest.raises(ValueError, match="x.cu: a launch or a shared array"):
            emulated.translated(text, "x.cu")
