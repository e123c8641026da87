"""The command blocks of the documents, and how each is run on a CPU.

Before a block of ```bash stands a comment that says what a test does with it:

    <!-- run -->               its lines as they are
    <!-- cpu: LINES -->        these lines in place of its own: the same commands, made small
    <!-- cpu form: NAME -->    the block that says `run: NAME` is the same path made small
    <!-- run: NAME -->         as `run`, and it is the CPU form of the blocks that name it
    <!-- not run: WHY -->      it needs what no test has; its commands are parsed all the same

The blocks of one document run in their order in one folder. A line is a `cmt` command, alone or behind torchrun, docker or
sbatch, or `python -m MODULE`; other programs are in blocks that are not run.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/performance.md", "docker/README.md")
FENCE = re.compile(
    r"(?:<!--\s*(?P<kind>run|cpu form|cpu|not run)(?::\s*(?P<text>.*?))?\s*-->\n)?```bash\n(?P<body>.*?)```", re.S
)


class Block(NamedTuple):
    """kind: of the comment, "" without one; text: what follows its colon; body: the lines that the reader sees."""

    document: str
    line: int
    kind: str
    text: str
    body: str

    @property
    def lines(self) -> list[str]:
        """What is run: the substitute's lines or its own."""
        return commands(self.text if self.kind == "cpu" else self.body)


def blocks(document: str) -> list[Block]:
    """All of a document's command blocks."""
    text = (ROOT / document).read_text("utf-8")
    return [
        Block(document, text.count("\n", 0, m.start("body")), m["kind"] or "", (m["text"] or "").strip(), m["body"])
        for m in FENCE.finditer(text)
    ]


def commands(body: str) -> list[str]:
    """Lines without comments, continued ones joined."""
    joined = re.sub(r"\\\n\s*", " ", body)
    return [line for raw in joined.splitlines() if (line := re.sub(r"(^|\s+)#.*", "", raw).strip())]


def cmt(line: str) -> list[str] | None:
    """The arguments of the `cmt` command in a line, whatever starts it; None where there is none."""
    words = shlex.split(line)
    for i, word in enumerate(words):
        if word == "cmt" and (not i or not words[i - 1].startswith("-")) and i + 1 < len(words):
            return cmt(shlex.join(words[i + 1 :])) or words[i + 1 :]
        if word == "-m" and words[i + 1 : i + 2] == ["cmt_fast"]:
            return words[i + 2 :]
    return None


def verbs(lines: list[str]) -> list[str]:
    """Command and action of every `cmt` line, in order."""
    found = [a for line in lines if (a := cmt(line))]
    return [" ".join(a[:2]) if a[0] in ("ckpt", "data", "recipes") else a[0] for a in found]
