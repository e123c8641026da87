"""Faults in machine code are found, and only those: in lines written here and in what a bad assembler really made."""

from __future__ import annotations

import lzma
import re
import subprocess
from pathlib import Path

import pytest
from cmt_kernels import assembler

from bench.kernels import resources, sass, sass_faults

PTX = Path(__file__).parent / "ptx"
needs_triton = pytest.mark.skipif(resources.missing() is not None, reason=f"no nvdisasm: {resources.missing()}")


def span(kind: str, first: int, count: int) -> set[str]:
    return {f"{kind}{first + i}" for i in range(count)}


@pytest.mark.parametrize(
    "text, reads, writes",
    [
        ("IADD3 R4, P0, R2, R3.reuse, RZ", {"R2", "R3"}, {"R4", "P0"}),
        ("IADD3.X R5, R3, R5, RZ, P0, !PT", {"R3", "R5", "P0"}, {"R5"}),
        ("@!P1 IMAD.WIDE.U32 R4, R2, 0x2, R8", {"P1", "R2", "R8", "R9"}, {"R4", "R5"}),
        ("UIADD3 UR14, UP0, UR11, 0x20, URZ", {"UR11"}, {"UR14", "UP0"}),
        ("UIADD3.64 UR4, UR8, UR6, URZ", span("UR", 8, 2) | span("UR", 6, 2), {"UR4", "UR5"}),
        ("LDG.E.128 R8, desc[UR6][R2.64+0x10]", {"UR6", "UR7", "R2", "R3"}, span("R", 8, 4)),
        ("STS.64 [R9+UR4+0x10], R12", {"R9", "UR4", "R12", "R13"}, set()),
        ("LDGSTS.E.64 [R20+0x200], desc[UR4][R6.64], !P2", {"R20", "UR4", "UR5", "R6", "R7", "P2"}, set()),
        ("ISETP.GE.U32.AND P2, PT, R4, 0xfa, !P1", {"R4", "P1"}, {"P2"}),
        ("SHFL.BFLY PT, R3, R7, 0x2, 0x1f", {"R7"}, {"R3"}),
        ("LOP3.LUT P0, RZ, R2, 0x1, RZ, 0xc0, !PT", {"R2"}, {"P0"}),
        ("CS2R R32, SRZ", set(), {"R32", "R33"}),
        ("F2FP.BF16.F32.PACK_AB R9, R3, R2", {"R3", "R2"}, {"R9"}),
        ("VOTEU.ANY UR4, UPT, P0", {"P0"}, {"UR4"}),
        ("P2R R2, PR, RZ, 0x5", {"P0", "P2"}, {"R2"}),
        ("LDSM.16.M88.4 R8, [R3+UR5]", {"R3", "UR5"}, span("R", 8, 4)),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0", span("UR", 8, 4), span("R", 24, 8)),
        # A in registers: of the descriptor pair the upper one alone, B's
        (
            "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR4].tnspB, R24",
            span("R", 40, 4) | span("R", 24, 16) | {"UR6", "UR7"},
            span("R", 24, 16),
        ),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", span("R", 8, 4) | {"R12", "R13"} | span("R", 4, 4), span("R", 4, 4)),
    ],
)
def test_what_an_instruction_reads_and_writes(text: str, reads: set[str], writes: set[str]) -> None:
    one = sass.instruction(0, text)
    assert one.reads == reads and one.writes == writes


@pytest.mark.parametrize("text", ["FNORD R1, R2", "HMMA.123.F32 R4, R8, R12, R4"])
def test_an_unknown_instruction_raises(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        sass.instruction(0, text)


def kernel(*lines: str) -> sass.Kernel:
    """Of these instructions; `>n` stands for the address of the n-th."""
    texts = [re.sub(r">(\d+)", lambda m: hex(16 * int(m[1]) + 0x500), line) for line in lines]
    return sass.kernel("test", [(16 * i + 0x500, text) for i, text in enumerate(texts)])


def unwritten(*lines: str) -> list[tuple[int, str]]:
    return [(one.address // 16, what.split(" read")[0]) for one, what in sass_faults.unwritten(kernel(*lines))]


def running(*lines: str) -> list[tuple[int, str]]:
    return [(one.address // 16, what) for one, what in sass_faults.running(kernel(*lines))]


def test_a_register_that_nothing_wrote() -> None:
    assert unwritten("UMOV UR4, 0x400", "UIADD3 UR6, UP0, UR5, 0x20, URZ", "EXIT") == [(1, "UR5")]
    assert unwritten("UMOV UR5, 0x400", "UIADD3 UR6, UP0, UR5, 0x20, URZ", "EXIT") == []
    assert unwritten("MOV R2, 0x1", "IMAD.WIDE R4, R2, 0x2, R6", "EXIT") == [(1, "R6, R7")]


def test_one_that_one_path_alone_writes() -> None:
    before = ("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x3, PT")
    skips = (*before, "@P0 BRA >4", "UMOV UR4, 0x1", "UIADD3 UR6, UR4, 0x20, URZ", "EXIT")
    assert unwritten(*skips) == [(4, "UR4")]
    both = (*before, "@P0 BRA >5", "UMOV UR4, 0x1", "BRA >6", "UMOV UR4, 0x2", "UIADD3 UR6, UR4, 0x20, URZ", "EXIT")
    assert unwritten(*both) == []


def test_one_that_a_loop_writes_too_late() -> None:
    loop = (
        "MOV R0, RZ",
        "IADD3 R0, R0, R5, RZ",
        "MOV R5, 0x1",
        "ISETP.GE.AND P0, PT, R0, 0x3, PT",
        "@!P0 BRA >1",
        "EXIT",
    )
    assert unwritten(*loop) == [(1, "R5")]
    assert unwritten("MOV R5, 0x1", *(line.replace(">1", ">2") for line in loop)) == []


def test_predicates_and_guards() -> None:
    assert unwritten("@P3 MOV R1, 0x1", "EXIT") == [(0, "P3")]
    assert unwritten("MOV R0, RZ", "SEL R2, R0, 0x3, UP1", "EXIT") == [(1, "UP1")]
    guarded = (
        "MOV R0, RZ",
        "ISETP.EQ.AND P0, PT, R0, RZ, PT",
        "@P0 MOV R1, 0x1",
        "@P0 IADD3 R2, R1, R0, RZ",
        "@!P0 EXIT",
        "EXIT",
    )
    assert unwritten(*guarded) == []


def test_half_a_register() -> None:
    assert unwritten("PRMT R3, RZ, 0x7610, R3", "IADD3 R4, R3, 0x1, RZ", "EXIT") == []
    assert unwritten("PRMT R3, RZ, 0x7610, R4", "EXIT") == [(0, "R4")]
    assert unwritten("PRMT R3, RZ, 0x5410, R3", "EXIT") == [(0, "R3")]  # its lower half moves up


def test_paths_that_join_again() -> None:
    before = ("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x3, PT", "BSSY B0, >6", "@P0 BRA >5", "MOV R7, 0x1")
    assert unwritten(*before, "BSYNC B0", "IADD3 R1, R7, 0x1, RZ", "EXIT") == [(6, "R7")]
    assert (
        unwritten(
            "MOV R7, RZ", *before[:2], "BSSY B0, >7", "@P0 BRA >6", "NOP", "BSYNC B0", "IADD3 R1, R7, 0x1, RZ", "EXIT"
        )
        == []
    )


def test_subroutines() -> None:
    """A call at 2 of what lies at 6 to 7."""
    code = ["MOV R3, RZ", "MOV R8, 0x30", "CALL.REL.NOINC >6", "IADD3 R1, R4, 0x1, RZ", "EXIT", "NOP"]
    body = ["IADD3 R4, R3, 0x1, RZ", "CS2R R8, SRZ", "RET.REL.NODEC R8 0x0"]
    assert unwritten(*code, *body) == []
    assert unwritten("NOP", *code[1:], *body) == [(6, "R3")]
    assert unwritten(*code, "IADD3 R5, R3, 0x1, RZ", *body[1:]) == [(3, "R4")]


def test_a_jump_that_is_not_understood_raises() -> None:
    for line in ("BRX R2 -0x10", "CALL.REL.NOINC 0x40", "BRA 0x40"):
        with pytest.raises(ValueError, match="is not followed"):
            kernel("MOV R2, RZ", line, "EXIT")


START = ("CS2R R40, SRZ", "CS2R R42, SRZ", "UMOV UR4, 0x1", "UMOV UR5, 0x1", "UMOV UR6, 0x1", "UMOV UR7, 0x1")
SHARED = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0"  # accumulates in R24 to R27
FROM = "HGMMA.64x8x16.F32.BF16 R24, R40, gdesc[UR4].tnspB, RZ, !UPT, gsb0"  # reads R40 to R43
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
USE = "FADD R1, R24, R25"


def test_accumulators_are_not_read_before_the_wait() -> None:
    assert running(*START, SHARED, USE, WAIT, "EXIT") == [(7, "R24, R25 of a running wgmma used")]
    assert running(*START, SHARED, WAIT, USE, "EXIT") == []
    assert running(*START, SHARED, "MOV R27, RZ", WAIT, "EXIT") == [(7, "R27 of a running wgmma used")]


def test_operands_in_registers_are_not_written_before_the_wait() -> None:
    assert running(*START, FROM, "MOV R42, RZ", WAIT, "EXIT") == [(7, "R42 written while a running wgmma reads")]
    assert running(*START, FROM, "IADD3 R1, R42, 0x1, RZ", WAIT, "MOV R42, RZ", "EXIT") == []


def test_a_wait_for_all_but_the_newest_group() -> None:
    two = (*START, SHARED, SHARED.replace("R24", "R32"), "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert running(*two, USE, "EXIT") == []
    assert running(*two, "FADD R1, R32, RZ", "EXIT") == [(9, "R32 of a running wgmma used")]
    open_group = (*START, SHARED, SHARED.replace(", gsb0", "").replace("R24", "R32"), WAIT)
    assert running(*open_group, "FADD R1, R32, RZ", "EXIT") == [(9, "R32 of a running wgmma used")]


def test_products_may_accumulate_on_but_not_feed_each_other() -> None:
    on = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
    assert running(*START, SHARED, on, WAIT, USE, "EXIT") == []
    fed = FROM.replace("R40", "R24").replace("BF16 R24", "BF16 R32")
    assert running(*START, SHARED, fed, WAIT, "EXIT") == [(7, "R24, R25, R26, R27 of a running wgmma used")]
    assert running(*START, FROM, SHARED.replace("R24", "R40"), WAIT, "EXIT")[0][0] == 7


def test_a_race_over_the_loop_s_edge() -> None:
    loop = ("FADD R1, R24, RZ", SHARED, "ISETP.GE.AND P0, PT, R1, RZ, PT", "@P0 BRA >6", WAIT, "EXIT")
    assert running(*START, *loop) == [(6, "R24 of a running wgmma used")]


def life_ranges(cubin: Path) -> dict[int, tuple[set[str], set[str]]]:
    """address -> (reads, writes) as nvdisasm's own table of life ranges says; {} where it prints none."""
    command = [resources.tool("nvdisasm"), "-c", "-plr", "-lrm", "narrow", cubin]
    lines = [
        line for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines() if "// |" in line
    ]
    kinds, columns, out = [], [], {}
    for line in lines:
        body, one = line[line.index("// |") :], sass.INSTRUCTION.match(line)
        if not one and "GPR" in body:
            kinds = [
                {"GPR": "R", "PRED": "P", "UGPR": "UR", "UPRED": "UP"}[k]
                for k in re.findall(r"\bU?(?:GPR|PRED)\b", body)
            ]
        elif not one and not columns and "#" in body:
            cells = [m for m in re.finditer(r"# (\d+)", body)]
            columns = [(k, m.start(1), len(m[1])) for k, m in zip(kinds, cells)]
        elif one:
            marks = {f"{k}{i}": body[at + i : at + i + 1] for k, at, n in columns for i in range(n)}
            sets = [{r for r, mark in marks.items() if mark and mark in which} for which in ("vx", "^x")]
            out[int(one[1], 16)] = (sets[0], sets[1])
    return out


def excused(one: sass.Instruction, reads: set[str], writes: set[str]) -> bool:
    """Where the table says otherwise and is not believed: it has all of a descriptor read where A is in registers, the
    predicate written under which LDGSTS copies, and neither the masks of P2R and R2P nor what a subroutine writes."""
    if one.name == "HGMMA":
        return one.operands[1].startswith("R") and writes == one.writes and {r[:2] for r in reads ^ one.reads} <= {"UR"}
    if one.name == "LDGSTS":
        return reads == one.reads and {r[0] for r in writes} == {"P"}
    return one.name in ("P2R", "R2P", "CALL")


@needs_triton
def test_operands_are_as_nvdisasm_has_them(tmp_path: Path) -> None:
    asked = (
        "attention forward dual d72 T250 bf16",
        "attention backward_kv d64 T256 bf16",
        "attention backward_q d72 T256 bf16",
    )
    own = [(op, gate) for op in resources.gated_ops() for gate in resources.gates(op)]
    some = [gate for op, gate in own if gate.name in asked] + [
        next(g for op, g in own if op == name) for name in resources.gated_ops()
    ]
    compared = 0
    for gate in some:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(resources.compile_gate(gate, 90).asm["cubin"])
        table = life_ranges(path)
        if not table:
            pytest.skip("this nvdisasm prints no life ranges of this assembler's code")
        (lines,) = sass.disassemble([path.read_bytes()], 90, resources.tool("nvdisasm"))
        for one in sass.kernel(gate.name, lines).code:
            reads, writes = table.get(one.address, (set(), set()))
            assert (reads, writes) == (one.reads, one.writes) or excused(one, reads, writes), f"{gate.name}: {one.text}"
            compared += one.address in table
    assert compared > 5000


def assembled(path: Path, ptxas: str, folder: Path) -> bytes:
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_bytes(lzma.decompress(path.read_bytes()))
    subprocess.run([ptxas, "-lineinfo", "--gpu-name=sm_90a", source, "-o", cubin], check=True, capture_output=True)
    return cubin.read_bytes()


FIXTURES = sorted(PTX.glob("*.xz"))
WRONG = {"16x40-forward": "UR11", "16x96-backward_kv": "UR14", "64x72-forward": "UR11", "33x72-forward": ""}


@needs_triton
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name.split(".")[0])
def test_what_12_8_93_miscompiled_is_found(path: Path, tmp_path: Path) -> None:
    """Red by that assembler where the card was wrong or read out of bounds, green where it was right."""
    old = [a for a in assembler.candidates() if a.version == (12, 8, 93)]
    if not old:
        pytest.skip("needs ptxas 12.8.93: pip install nvidia-cuda-nvcc-cu12==12.8.93")
    (lines,) = sass.disassemble([assembled(path, old[0].path, tmp_path)], 90, resources.tool("nvdisasm"))
    said = resources.faults(lines)
    expected = WRONG[path.name.split(".")[0]]
    assert said.startswith(f"{expected} read, never written at") and "UIADD3" in said if expected else said == ""


@needs_triton
def test_every_other_assembler_at_hand_is_right_of_them(tmp_path: Path) -> None:
    others = [a for a in assembler.candidates() if not assembler.wgmma_fault(a.version)[1]]
    assert others
    for one in others:
        codes = sass.disassemble([assembled(p, one.path, tmp_path) for p in FIXTURES], 90, resources.tool("nvdisasm"))
        assert [resources.faults(lines) for lines in codes] == [""] * len(FIXTURES) and len(FIXTURES) == 4, one
