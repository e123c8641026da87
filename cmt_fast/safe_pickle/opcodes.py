"""The opcodes of a pickle, read without acting on them: what does not belong in a checkpoint is refused before it is loaded."""

from __future__ import annotations

import pickletools
import re
from typing import Any, BinaryIO

MAX_OPCODES = 4_000_000  # a layer takes about 150, the largest networks have some hundred of them
MAX_TEXT = 16 << 20  # one string; the longest in real files is a module's source

# what picklers of protocol 2 and later write for modules, arrays and plain data
OPCODES = frozenset(
    re.findall(
        r"\w+",
        """MARK STOP POP DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE BINUNICODE8
        SHORT_BINUNICODE BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS
        EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET BINGET LONG_BINGET
        BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ PROTO FRAME""",
    )
)
TEXT = {"BINUNICODE", "BINUNICODE8", "BINSTRING", "GLOBAL", "LONG4"}


class Refused(ValueError):
    """The file holds what a checkpoint of this kind does not: one line that says what, with nothing that is not printable."""

    def __init__(self, text: str) -> None:
        super().__init__(
            text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        )


def shown(value: Any, most: int = 80) -> str:
    """A foreign value for a message: text with its control characters escaped, cut at `most`; of anything else its type."""
    small = isinstance(value, str) or (type(value) is int and abs(value) < 2**64)
    return ascii(str(value))[1:-1][:most] if small else type(value).__name__


def scan(file: BinaryIO, size: int, allowed: frozenset[str] = OPCODES, most: int = MAX_OPCODES) -> None:
    """Read the opcodes up to STOP without acting on them. Raises Refused for one that does not belong, or too many."""
    memo = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(file), start=1):
        if opcode.name not in allowed:
            raise Refused(f"opcode {opcode.name} at byte {position}, which these files do not use")
        if (opcode.name == "PROTO") != (count == 1):
            raise Refused("it does not begin with a protocol, or has two")
        if opcode.name == "PROTO" and not 2 <= argument <= 5:
            raise Refused(f"protocol {argument}")
        if opcode.name in TEXT and _bytes(argument) > MAX_TEXT:
            raise Refused(f"a name or number of more than {MAX_TEXT} bytes")
        if opcode.name == "FRAME" and argument > size:
            raise Refused(f"a frame of {argument} bytes in a file of {size}")
        memo += opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > 2 * memo + 256:  # a memo is a table of that length
            raise Refused(f"memo entry {argument} after {memo} entries")
        if count > most:
            raise Refused(f"more than {most} opcodes")


def _bytes(argument: str | int) -> float:
    return len(argument) if isinstance(argument, str) else argument.bit_length() / 8
