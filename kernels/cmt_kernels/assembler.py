"""Which ptxas turns Triton's PTX into machine code on sm_90: the newest at hand without a known fault, chosen before the
first compile.

The assembler is a dependency like any other, and a wrong one is silent: the one in the wheels of Triton 3.6 and 3.7 made
attention wrong on an H100 by 20 to 50 % (2026-11-26, bf16, T 33 to 77, head dims of 36, 72 and 80), by reading registers
that nothing had written. A newer one lies in the same wheels, in the CUDA toolkit, in the package nvidia-cuda-nvcc. So:

* `candidates` lists what is there and asks each for its version, once;
* `choose` takes the first, by `rank` and then by version, that assembles for the card, and sets what Triton reads:
  `TRITON_PTXAS_PATH` and `TRITON_PTXAS_BLACKWELL_PATH` (Triton 3.6 to 3.8 read the second from sm_100 on, 3.9 from sm_90
  on). One that is set already is left alone. Triton asks again at every compile, derives the PTX version from the
  assembler's and keeps what it compiled under the assembler's full version, so nothing that another one made is reused;
* `refusal` says why the kernels that use wgmma may not run with what was chosen.

What is known of wgmma (sm_90 alone), in public and by our own search of the machine code (`python -m bench gates`):

* 12.8: registers are read that nothing wrote. github.com/fla-org/flash-linear-attention/pull/1262 has 12.8.93 with wrong
  numbers and a shared-memory fault; of 120 kernels of attention in Triton 3.6's PTX, T 1 to 1024, it makes 39 so. Refused.
* 12.9 to 13.2: the input registers of a running wgmma may be written again, mended in 13.3:
  github.com/triton-lang/triton/pull/11781, CUDA 13.3 release notes. 13.0.88 besides writes shared memory out of bounds in
  the pull request above, where 13.1.80 is right. Used where nothing newer is there: in those 120 kernels 12.6.85, 12.9.86,
  13.0.88, 13.1.80, 13.3.33, 13.4.59 and 13.5.37 do neither (2026-11-27). What a card says of them is another question.

On other architectures Triton keeps its own: of nothing like it is anything known there, and newer is not better for its own
sake (13.4.59 spills in 7 of our kernels for sm_80 of which 12.9.86 spills in none).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
OURS = "CMT_ASSEMBLER"  # NAME=path of what was set here, so that a child process does not take it for a user's wish
TOOLKIT = Path("/usr/local/cuda")
WGMMA = 90  # the one architecture with wgmma
Version = tuple[int, ...]

# versions below -> rank (0 is best), whether refused, what is wrong; the first row that holds counts
WGMMA_FAULTS: tuple[tuple[Version, int, bool, str], ...] = (
    ((12, 8), 2, False, "is older than all that were tried on a card"),
    ((12, 9), 3, True, "reads registers that nothing wrote in wgmma kernels (flash-linear-attention #1262)"),
    ((13, 0), 1, False, "may write input registers of a running wgmma (triton #11781)"),
    ((13, 1), 2, False, "may write shared memory out of bounds (flash-linear-attention #1262)"),
    ((13, 3), 1, False, "may write input registers of a running wgmma (triton #11781)"),
)


class Assembler(NamedTuple):
    """A ptxas: where it is, (12, 8, 93), and who brought it ("triton", "PATH", "nvidia-cuda-nvcc", ...)."""

    path: str
    version: Version
    origin: str

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    def __str__(self) -> str:
        return f"ptxas {self.version_text} of {self.origin}"


class Choice(NamedTuple):
    """What Triton runs, or None where it has nothing to run; why that one, in a few words."""

    assembler: Assembler | None
    why: str

    def __str__(self) -> str:
        return f"{self.assembler}, {self.why}" if self.assembler else self.why


_chosen: dict[int | None, tuple[Choice, str | None]] = {}  # architecture -> its choice, the path that was set for it


@functools.cache
def version(path: str) -> Version | None:
    """(12, 8, 93) of a ptxas, None of what does not run or does not say."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said) or re.search(r"\brelease (\d+\.\d+)", said)
    return tuple(map(int, found[1].split("."))) if found else None


def _package(name: str) -> list[Path]:
    """The folders of a package, [] where it is not installed; several where its parts lie in several places."""
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return list(
        dict.fromkeys(Path(f) for f in (*folders, *(os.path.join(p, name) for p in sys.path)) if os.path.isdir(f))
    )


def _places() -> list[tuple[str, str]]:
    """(path, origin) of every file that may be a ptxas, whether it is there or not."""
    places = []
    for folder in _package("triton"):
        own = folder / "backends" / "nvidia" / "bin"
        places += [(str(own / "ptxas"), "triton"), (str(own / "ptxas-blackwell"), "triton's ptxas-blackwell")]
    for folder in _package("nvidia"):
        places += [(str(p), "nvidia-cuda-nvcc") for p in sorted(folder.glob("c*/bin/ptxas"))]
    places += [(str(folder / "bin" / "ptxas"), "torch") for folder in _package("torch")]
    places += [(str(Path(os.environ[v], "bin", "ptxas")), v) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    places += [(shutil.which("ptxas") or "", "PATH"), (str(TOOLKIT / "bin" / "ptxas"), str(TOOLKIT))]
    return places + [(os.environ[name], name) for name in VARIABLES if os.environ.get(name)]


def candidates() -> list[Assembler]:
    """Every ptxas at hand that tells its version, each file once, in the order of the places looked at."""
    found = {}
    for path, origin in _places():
        real = os.path.realpath(path) if path else ""
        if real and real not in found and os.path.isfile(path) and version(path):
            found[real] = Assembler(path, version(path), origin)
    return list(found.values())


def wgmma_fault(of: Version) -> tuple[int, bool, str]:
    """(rank, refused, what is wrong) of a version for wgmma; (0, False, "") where nothing is known."""
    return next((row[1:] for row in WGMMA_FAULTS if of < row[0]), (0, False, ""))


def preferred(found: list[Assembler]) -> list[Assembler]:
    """Best first for wgmma: by what is known of them, then the newest."""
    newest = sorted(found, key=lambda a: a.version, reverse=True)
    return sorted(newest, key=lambda a: wgmma_fault(a.version)[0])


def assembles(assembler: Assembler, architecture: int) -> bool:
    """Whether it takes an empty kernel for sm_<architecture>, in the PTX version that Triton would write for it."""
    from triton.backends.nvidia import compiler

    target = compiler.sm_arch_from_capability(architecture)
    try:
        ptx = compiler.ptx_get_version(".".join(map(str, assembler.version[:2])))
    except (RuntimeError, ValueError):
        return False  # older than Triton knows
    text = f".version {ptx // 10}.{ptx % 10}\n.target {target}\n.address_size 64\n.visible .entry probe() {{ ret; }}\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.ptx")
        source.write_text(text, encoding="utf-8")
        command = [assembler.path, f"--gpu-name={target}", str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def card() -> int | None:
    """90 for the current GPU of compute capability 9.0; None without a GPU of NVIDIA's."""
    import torch

    if torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def used(architecture: int) -> Assembler | None:
    """What Triton runs for sm_<architecture>, asked of Triton itself; None where it finds nothing that runs."""
    from triton.backends.nvidia import compiler

    try:
        path = compiler.get_ptxas(architecture).path
    except RuntimeError:
        return None
    origin = next((o for p, o in _places() if p and os.path.realpath(p) == os.path.realpath(path)), "triton.knobs")
    return Assembler(path, version(path) or (0,), origin)


def _asked() -> dict[str, str]:
    """What a user set of VARIABLES."""
    ours = (os.environ.get(OURS) or "").split(os.pathsep)
    found = {name: os.environ.get(name) for name in VARIABLES}
    return {name: path for name, path in found.items() if path and f"{name}={path}" not in ours}


def _set(path: str | None) -> None:
    """Make Triton assemble with this one, None: with its own; a user's wish stays. Its cache key is made anew: where it
    asked for the version before, it would keep code of this one under the name of that one."""
    from triton.backends.nvidia import compiler

    asked = _asked()
    ours = {name: path for name in VARIABLES if path and name not in asked}
    record = os.pathsep.join(f"{name}={path}" for name in ours)
    wanted = {**dict.fromkeys(VARIABLES), **asked, **ours, OURS: record}
    if all((os.environ.get(name) or "") == (value or "") for name, value in wanted.items()):
        return
    for name, value in wanted.items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value
    for function in (compiler.get_ptxas_version, compiler.CUDABackend.hash):
        getattr(function, "cache_clear", lambda: None)()


def choose(architecture: int | None) -> Choice:
    """What Triton assembles with for sm_<architecture>, set from here on; to be called before Triton compiles for it.

    The search is made once a process. None: of no card, and then nothing is chosen.
    """
    if importlib.util.find_spec("triton") is None:
        return Choice(None, "triton is not installed")
    if architecture not in _chosen:
        _chosen[architecture] = _choose(architecture)
    else:
        _set(_chosen[architecture][1])
    return _chosen[architecture][0]


def _choose(architecture: int | None) -> tuple[Choice, str | None]:
    asked, found, path = _asked(), candidates(), None
    if architecture == WGMMA and len(asked) < len(VARIABLES):
        path = next((a.path for a in preferred(found) if assembles(a, architecture)), None)
    _set(path)
    runs = used(architecture or WGMMA)
    if runs is None:
        return Choice(None, "no ptxas runs"), path
    dead = [name for name, wish in asked.items() if version(wish) is None]
    says = [name for name, wish in asked.items() if wish == runs.path]
    if says:
        return Choice(runs._replace(origin=runs.path), f"as {says[0]} says"), path
    why = f"{dead[0]} names none that runs" if dead else f"of {len(found)} at hand" if path else "Triton's own choice"
    return Choice(runs, why), path


def refusal(architecture: int | None) -> str | None:
    """Why kernels that use wgmma may not run on sm_<architecture> with what was chosen, in one line; None if they may."""
    if architecture != WGMMA:
        return None
    choice = choose(architecture)
    if choice.assembler is None:
        return f"nothing assembles: {choice.why}"
    _, refused, wrong = wgmma_fault(choice.assembler.version)
    better = "pip install 'nvidia-cuda-nvcc>=13.3', or name a newer one in " + VARIABLES[0]
    return f"{choice.assembler} {wrong}; {better}" if refused else None
