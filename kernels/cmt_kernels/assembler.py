"""Which ptxas turns Triton's PTX into machine code: the newest at hand that has no known fault, chosen before the first compile.

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
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
ARCHITECTURES = (80, 90, 100)  # what must be assembled where no card says what is
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


_chosen: dict[str, Choice] = {}  # "choice" -> that of this process, once it is made


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
    """The folders of a package, [] where it is not installed."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


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


def preferred(found: list[Assembler], wgmma: bool) -> list[Assembler]:
    """Best first: by what is known of them where the kernels use wgmma, then the newest."""
    newest = sorted(found, key=lambda a: a.version, reverse=True)
    return sorted(newest, key=lambda a: wgmma_fault(a.version)[0]) if wgmma else newest


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
        source.write_text(text)
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


def _forget() -> None:
    """Make Triton ask for the version again where it did before this choice: its cache key must be the new one's."""
    from triton.backends.nvidia import compiler

    for function in (compiler.get_ptxas_version, compiler.CUDABackend.hash):
        getattr(function, "cache_clear", lambda: None)()


def choose(architecture: int | None = None) -> Choice:
    """What Triton assembles with in this process, made on the first call: before Triton compiles anything of ours.

    architecture: 90 for sm_90; None where there is no card, and then it must serve all of ARCHITECTURES.
    """
    if "choice" not in _chosen:
        _chosen["choice"] = _choose(architecture)
    return _chosen["choice"]


def _choose(architecture: int | None) -> Choice:
    if importlib.util.find_spec("triton") is None:
        return Choice(None, "triton is not installed")
    asked = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    found = candidates()
    needed = ARCHITECTURES if architecture is None else (architecture,)
    if len(asked) < len(VARIABLES):
        best = next((a for a in preferred(found, WGMMA in needed) if all(assembles(a, n) for n in needed)), None)
        os.environ.update({name: best.path for name in VARIABLES if best and name not in asked})
    _forget()
    runs = used(WGMMA if architecture is None else architecture)
    if runs is None:
        return Choice(None, "no ptxas runs")
    dead = [name for name, path in asked.items() if version(path) is None]
    says = [name for name, path in asked.items() if path == runs.path]
    if says:
        return Choice(runs._replace(origin=runs.path), f"as {says[0]} says")
    return Choice(runs, f"{dead[0]} names none that runs" if dead else f"of {len(found)} at hand")


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
