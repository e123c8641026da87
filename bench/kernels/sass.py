"""Machine code as text, read: instructions, which registers each reads and writes, and which may follow which.

`nvdisasm` writes the same text for every assembler; what an operand means it does not say. Here it is said for what our
kernels are made of: the first operand is written, a `.64` or `.128` in the name makes values 2 or 4 registers wide, and
tables hold what departs from that. An instruction that is not in them raises. (`nvdisasm -plr` prints what it knows of
this, but refuses code of another assembler's generation; a test holds this page against it where it does not.)

A register is a string: "R4", "UR4" (uniform), "P0", "UP0". RZ, URZ, PT and UPT are constants, no registers.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
GUARD = re.compile(r"^@(!?)(U?P\d|U?PT)\s+")
TOKEN = re.compile(r"(?<![\w.])(UR|R|UP|P)(\d+)\b(\.64)?")
TARGET = re.compile(r"\b0x([0-9a-f]+)$")
PREDICATE = re.compile(r"^U?P(\d|T)$")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# writes no register: what goes to memory, waits, and goes elsewhere; what stands between WARPSYNC.COLLECTIVE and ENDCOLLECTIVE,
# a shuffle where lanes have parted, runs once for all of them, and so as it stands
NOTHING = _words("""
    ST STG STS STL STSM RED REDG LDGSTS LDGDEPBAR BAR BRA BRX JMP EXIT RET CALL NOP WARPSYNC WARPGROUP MEMBAR ERRBAR CCTL
    CCTLL DEPBAR FENCE BSSY BSYNC BREAK BPT NANOSLEEP YIELD PREEXIT ACQBULK KILL ENDCOLLECTIVE""")
SETS_TWO = _words("ISETP FSETP DSETP HSETP2 UISETP UFSETP PLOP3 UPLOP3")
CARRIES = _words("IADD3 UIADD3 LEA ULEA IMAD UIMAD LOP3 ULOP3")  # predicates may follow the result and be results too
LATE_RESULT = _words("SHFL ATOM ATOMG ATOMS MATCH LOP3 ULOP3 R2UR ELECT")  # a predicate may stand before it
ONE_WIDE = _words("""
    I2FP F2FP FADD FFMA FMUL FMNMX FMNMX3 FSEL FSET FSETP FCHK HADD2 HFMA2 HMUL2 HMNMX2 HSETP2 HSET2 MUFU IADD3 VIADD VIMNMX
    VIADDMNMX IMNMX IABS ISETP LEA LOP3 MOV NOP P2R R2P PLOP3 POPC FLO PRMT R2UR S2R S2UR SEL SGXT SHF SHFL BREV BMSK VOTE
    VOTEU REDUX ELECT MATCH UIADD3 UISETP ULEA ULOP3 UMOV UPRMT USEL USGXT USHF UPOPC UFLO UBREV UBMSK UPLOP3 UP2UR BAR BRA
    BRX JMP EXIT RET CALL F2I I2F F2F FRND LDGDEPBAR WARPGROUP WARPSYNC MEMBAR ERRBAR CCTL CCTLL DEPBAR FENCE BSSY BSYNC
    BREAK BPT NANOSLEEP YIELD PREEXIT ACQBULK KILL ENDCOLLECTIVE""")
MEMORY = _words("LD LDG LDS LDL LDC ULDC LDCU ST STG STS STL RED REDG ATOM ATOMG ATOMS LDGSTS LDSM STSM")
OTHER = _words("IMAD UIMAD HGMMA HMMA IMMA CS2R DADD DMUL DFMA DSETP DMNMX")


class Instruction(NamedTuple):
    """One line of a kernel. guard: the predicate that it runs under, "!P0" as written, or None."""

    address: int
    text: str
    opcode: str
    guard: str | None
    operands: tuple[str, ...]
    reads: frozenset[str]
    writes: frozenset[str]

    @property
    def name(self) -> str:
        """HGMMA of HGMMA.64x64x16.F32.BF16."""
        return self.opcode.split(".", 1)[0]

    @property
    def keeps(self) -> frozenset[str]:
        """The register of which a PRMT replaces some bytes and keeps the others where they are: how 16 bits are written."""
        if self.name != "PRMT" or self.operands[0] != self.operands[3].removesuffix(".reuse"):
            return frozenset()
        bytes_ = [int(self.operands[2], 0) >> 4 * i & 7 for i in range(4)] if self.operands[2].startswith("0x") else [0]
        in_place = all(byte == 4 + i for i, byte in enumerate(bytes_) if byte >= 4)
        other = self.operands[1].removesuffix(".reuse") != self.operands[0]
        return self.writes if in_place and other else frozenset()


class Kernel(NamedTuple):
    """Instructions in order, and the indices of those that may follow each."""

    name: str
    code: list[Instruction]
    following: list[list[int]]


def _split(text: str) -> tuple[str, ...]:
    """Operands of an instruction: at commas, but for those in brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^(\[{]*[)\]}])", text) if part.strip())


def _wide(opcode: str) -> int:
    """Registers of a value as the opcode says: .128 four, .64 two, else one."""
    parts = opcode.split(".")
    return 4 if "128" in parts else 2 if {"64", "U64", "S64", "F64"} & set(parts) else 1


def _matrix(opcode: str) -> tuple[int, int, int, int]:
    """Registers of (D, A, B, C) of a matrix product."""
    name, shape, *kinds = opcode.split(".")
    if name == "HGMMA":
        n = int(shape.split("x")[1])
        d = n // (2 if "F32" in kinds else 4)
        return d, 4, 0, d
    sizes = {"16816": (4, 2), "1688": (2, 1), "16832": (4, 2), "16864": (4, 2), "8816": (1, 1), "884": (1, 1)}
    if shape not in sizes:
        raise ValueError(f"{opcode} is not understood")
    a, b = sizes[shape]
    if "TF32" in kinds:
        a, b = (4, 2) if shape == "1688" else (2, 1)
    d = 4 if "F32" in kinds or name == "IMMA" else 2
    return d, a, b, d


def _width(opcode: str, operands: tuple[str, ...], index: int) -> int:
    """Registers of the value in operand `index`, brackets apart."""
    name, parts = opcode.split(".", 1)[0], opcode.split(".")
    if name in (
        "HGMMA",
        "HMMA",
        "IMMA",
    ):  # D, A, B, C; of HGMMA B is a descriptor, and with it A where A is none of registers
        return _matrix(opcode)[3 if name == "HGMMA" and index > 1 else min(index, 3)]
    if name in ("IMAD", "UIMAD"):
        values = [i for i, o in enumerate(operands) if not PREDICATE.match(o.lstrip("!"))]
        return 2 if "WIDE" in parts and index in (values[0], values[-1]) else 1
    if name in ("LDSM", "STSM"):
        return int(parts[-1]) if parts[-1] in ("2", "4") else 1
    if name == "CS2R":
        return 1 if "32" in parts else 2
    if name in ("F2I", "I2F", "F2F", "I2I", "FRND"):  # F2F.F32.F64 D, S: the first kind named is the result's
        kinds = [p for p in parts[1:] if re.fullmatch(r"[FUS]\d+", p)]
        default = {"F2I": ("S32", "F32"), "I2F": ("F32", "S32")}.get(name, ("F32", "F32"))
        named = kinds if len(kinds) == 2 else [kinds[0], default[1]] if kinds else list(default)
        if len(kinds) == 1 and name == "I2F" and kinds[0][0] in "US":
            named = ["F32", kinds[0]]
        return 2 if named[min(index, 1)].endswith("64") else 1
    if name == "RET" or name.startswith("D") and name in OTHER:
        return 2
    if name in MEMORY or "64" in parts and name in ("UIADD3", "UMOV", "MOV", "UISETP", "ISETP", "USEL", "SEL", "IADD"):
        return _wide(opcode)
    return 1


def _registers(opcode: str, operands: tuple[str, ...], index: int) -> set[str]:
    """Registers that operand `index` names."""
    operand = operands[index].replace(".reuse", "")
    found: set[str] = set()
    for match in TOKEN.finditer(operand):
        kind, number = match[1], int(match[2])
        first, width = number, 1
        before = operand[: match.start()]
        if kind in ("P", "UP"):
            pass
        elif before.endswith("gdesc["):  # A and B, 64 bits each: with A in registers the upper two alone
            first, width = (number, 4) if index == 1 else (number + 2, 2)
        elif before.endswith("desc["):
            width = 2
        elif "[" in before:
            width = 2 if match[3] else 1
        else:
            width = _width(opcode, operands, index)
        found |= {f"{kind}{first + i}" for i in range(width)}
    return found


def _results(name: str, operands: tuple[str, ...]) -> int:
    """How many of the first operands are written."""
    if name in NOTHING or not operands:
        return 0
    if name in SETS_TWO:
        return 2
    count = 1
    if name in LATE_RESULT and PREDICATE.match(operands[0]) and len(operands) > 1:
        count = 2
    if name in ("VOTE", "VOTEU"):
        return len(operands) - 1
    if name in CARRIES:
        while count < len(operands) and PREDICATE.match(operands[count]):
            count += 1
    return count


def instruction(address: int, text: str) -> Instruction:
    """Read one line's instruction. Raises ValueError for one that this page does not know."""
    guarded = GUARD.match(text)
    opcode, _, rest = (text[guarded.end() :] if guarded else text).partition(" ")
    name, operands = opcode.split(".", 1)[0], _split(rest)
    if not (name in ONE_WIDE or name in MEMORY or name in OTHER):
        raise ValueError(f"{name} is not understood: {text}")
    reads: set[str] = set()
    writes: set[str] = set()
    results = _results(name, operands)
    for i in range(len(operands)):
        into = writes if i < results and "[" not in operands[i] else reads
        into |= _registers(opcode, operands, i)
    if name in ("P2R", "R2P", "UP2UR"):
        kind, mask = ("UP" if name.startswith("U") else "P"), int(operands[-1], 16)
        (reads if "P2" in name else writes).update(f"{kind}{i}" for i in range(7) if mask >> i & 1)
    guard = guarded[1] + guarded[2] if guarded else None
    if guarded and guarded[2] not in ("PT", "UPT"):
        reads.add(guarded[2])
    return Instruction(address, text, opcode, guard, operands, frozenset(reads), frozenset(writes))


def _following(code: list[Instruction], base: int) -> list[list[int]]:
    """Indices of the instructions that may run after each. Raises ValueError for a jump that is not understood.

    A CALL goes into the subroutine and past it, and is taken to write all that the subroutine writes; a RET ends its path.
    """
    places = {one.address + base: i for i, one in enumerate(code)}

    def target(one: Instruction) -> int:
        found = TARGET.search(one.operands[-1]) if one.operands else None
        if not found or int(found[1], 16) not in places:
            raise ValueError(f"{one.name} is not followed: {one.text}")
        return places[int(found[1], 16)]

    joins: dict[str, set[int]] = {}
    for one in code:
        if one.name == "BSSY":
            joins.setdefault(one.operands[0], set()).add(target(one))
    out = []
    for i, one in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        if one.name in ("BRX", "JMP"):
            raise ValueError(f"{one.name} is not followed: {one.text}")
        if one.name == "CALL":
            out.append([target(one), *after])
        elif one.name == "RET":
            out.append([])
        elif one.name == "EXIT":
            out.append(after if one.guard else [])
        elif one.name == "BRA":
            conditional = one.guard or len(one.operands) > 1
            out.append([target(one), *(after if conditional else [])])
        elif one.name == "BSYNC":  # to the one BSSY's end that lies right behind, else to any of this register
            ends = joins.get(one.operands[0], set())
            to = after if set(after) & ends or not ends else sorted(ends)
            out.append(sorted({*to, *(after if one.guard else [])}))
        else:
            out.append(after)
    return out


def kernel(name: str, lines: Iterable[tuple[int, str]]) -> Kernel:
    """The kernel of these (address, instruction) pairs, the first of which is where it begins; jumps name addresses.

    Raises ValueError where something in it is not understood.
    """
    lines = list(lines)
    base = lines[0][0]
    code = [instruction(address - base, text) for address, text in lines]
    following = _following(code, base)
    for i, one in enumerate(code):
        if one.name == "CALL":
            code[i] = one._replace(writes=_writes_of(code, following, following[i][0]))
    return Kernel(name, code, following)


def _writes_of(code: list[Instruction], following: list[list[int]], start: int) -> frozenset[str]:
    """All that a subroutine may write: what runs from where it begins to where it returns."""
    seen, work = set(), [start]
    while work:
        i = work.pop()
        if i not in seen:
            seen.add(i)
            work += following[i]
    return frozenset().union(*(code[i].writes for i in seen))


def read(text: str) -> list[tuple[int, str]]:
    """(address, instruction) of every line of a disassembly that is one."""
    found = (INSTRUCTION.match(line) for line in text.splitlines())
    return [(int(one[1], 16), one[2]) for one in found if one]


def sections(cubin: bytes) -> list[tuple[str, bytes]]:
    """(kernel's name, machine code) of a cubin, which is an ELF file."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    table = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    strings = cubin[table[names][4] :]
    named = ((strings[row[0] : strings.index(b"\0", row[0])].decode(), row) for row in table)
    return [(n.removeprefix(".text."), cubin[r[4] : r[4] + r[5]]) for n, r in named if n.startswith(".text.")]


def disassemble(cubins: Sequence[bytes], architecture: int, nvdisasm: Path) -> list[list[tuple[int, str]]]:
    """(address, instruction) pairs of the one kernel of each cubin, for `kernel`.

    By one call, as one stretch of raw code: it starts slowly, and refuses files of an older assembler's format.
    """
    codes = []
    for cubin in cubins:
        ((_, code),) = sections(cubin)
        codes.append(code)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "code")
        raw.write_bytes(b"".join(codes))
        target = f"SM{architecture}{'a' if architecture >= 90 else ''}"
        done = subprocess.run([nvdisasm, "-b", target, raw], capture_output=True, text=True, check=True)
    lines, out, end = iter(read(done.stdout)), [], 0
    pending = next(lines, None)
    for code in codes:
        end += len(code)
        own = []
        while pending and pending[0] < end:
            own.append(pending)
            pending = next(lines, None)
        if len(own) * 16 != len(code):
            raise ValueError(f"{len(code)} bytes of code gave {len(own)} instructions")
        out.append(own)
    return out


def summary(found: Iterable[tuple[Instruction, str]]) -> str:
    """The first of what was found, in one line; "" for nothing."""
    rows = list(found)
    if not rows:
        return ""
    one, what = rows[0]
    return f"{what} at {one.address:#x} `{one.text}`" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
