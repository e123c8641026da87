"""Two faults that an assembler can put into right PTX, searched for in the machine code over every path through it.

* `unwritten`: a register or predicate that is read though on some path nothing has written it. ptxas 12.8.93 did this to
  the descriptor of a wgmma (HGMMA in machine code), which then read some other shared memory than was meant.
* `running`: HGMMA is asynchronous. From its issue until the `WARPGROUP.DEPBAR` that waits for its group it writes its
  accumulators and reads those operands that are registers; whoever touches the first or writes the second races with it.

Both are facts of the code, not of a run: they need no GPU, and say nothing of values. A write under a guard (`@P0 MOV R1`)
counts as a write, because assemblers keep a value and its use under one predicate, and so does one of half a register: a
fault that hides in either is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from bench.kernels.sass import Instruction, Kernel

State = TypeVar("State")
Found = list[tuple[Instruction, str]]


def _flow(
    kernel: Kernel, start: State, step: Callable[[int, State], State], merge: Callable[[State, State], State]
) -> list[State | None]:
    """The state before each instruction, merged over all paths that lead there; None where none does."""
    before: list[State | None] = [None] * len(kernel.code)
    before[0] = start
    work = [0]
    while work:
        i = work.pop()
        after = step(i, before[i])
        for j in kernel.following[i]:
            merged = after if before[j] is None else merge(before[j], after)
            if merged != before[j]:
                before[j] = merged
                work.append(j)
    return before


def _names(registers: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(registers, key=lambda r: (r.rstrip("0123456789"), int(re.search(r"\d+", r)[0]))))


def unwritten(kernel: Kernel) -> Found:
    """Instructions that read what some path to them has not written, and what that is."""
    numbers: dict[str, int] = {}
    mask = lambda names: sum(1 << numbers.setdefault(name, len(numbers)) for name in names)
    reads = [mask(one.reads - one.keeps) for one in kernel.code]
    writes = [mask(one.writes) for one in kernel.code]
    everything = (1 << len(numbers)) - 1
    before = _flow(kernel, everything, lambda i, open_: open_ & ~writes[i], lambda a, b: a | b)
    out = []
    for i, one in enumerate(kernel.code):
        bad = reads[i] & before[i] if before[i] else 0
        if bad:
            out.append((one, f"{_names({name for name, n in numbers.items() if bad >> n & 1})} read, never written"))
    return out


Running = frozenset[
    tuple[str, str, int]
]  # (register, "written" or "read" by a wgmma, age of its group; -1: still open)


def _youngest(*states: Running) -> Running:
    """All of it, and of what is in use twice the younger use: the one that a wait reaches last."""
    ages: dict[tuple[str, str], int] = {}
    for register, how, age in (entry for state in states for entry in state):
        ages[register, how] = min(age, ages.get((register, how), age))
    return frozenset((*key, age) for key, age in ages.items())


def _issue(one: Instruction, state: Running) -> Running:
    """After an HGMMA: its accumulators and its operands in registers are in use; gsb0 closes the group."""
    own = {(r, "written", -1) for r in one.writes if r[0] == "R"}
    own |= {(r, "read", -1) for r in one.reads - one.writes if r[0] == "R"}
    state = _youngest(state, frozenset(own))
    return frozenset((r, how, age + 1) for r, how, age in state) if "gsb0" in one.operands else state


def _collision(one: Instruction, state: Running) -> str:
    """What of a running wgmma an instruction touches; "" if nothing. Accumulating on is allowed: they run in order."""
    written = {r for r, how, _ in state if how == "written"}
    read = {r for r, how, _ in state if how == "read"}
    touched = (one.reads | one.writes) & written
    if one.name == "HGMMA":
        touched -= one.writes
    if touched:
        return f"{_names(touched)} of a running wgmma used"
    return f"{_names(one.writes & read)} written while a running wgmma reads" if one.writes & read else ""


def running(kernel: Kernel) -> Found:
    """Instructions that touch accumulators or write operands of a wgmma which may still run."""
    if not any(one.name == "HGMMA" for one in kernel.code):
        return []

    def step(i: int, state: Running) -> Running:
        one = kernel.code[i]
        if one.name == "HGMMA":
            return _issue(one, state)
        if one.opcode.startswith("WARPGROUP.DEPBAR") and one.operands[0] == "gsb0":
            pending = int(one.operands[1], 16)
            return frozenset(entry for entry in state if entry[2] < pending)
        return state

    before = _flow(kernel, frozenset(), step, _youngest)
    pairs = [(one, _collision(one, state)) for one, state in zip(kernel.code, before) if state]
    return [(one, what) for one, what in pairs if what]
