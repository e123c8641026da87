"""How long functions are and how many parameters they have: what is beyond a limit gives its reason in the docstring.

A sentence that begins with `Long:` speaks for a function of more than LINES lines, one with `Many parameters:` for more
than PARAMETERS, `self` and `cls` not counted. A reason without its cause is a fault too. Of one kind no reason is asked:

* Triton kernels, for both: a kernel is one launch that is not cut, and takes every pointer, stride and size by itself;
* custom ops and their fakes, and what has the signature of an op (its backends, `case_of`), for parameters: these are the
  op's own tensors, and `test_backends_share_the_public_signature` holds them to the public function, which has the reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES, PARAMETERS = 60, 8
FILES = sorted(
    path for top in ("cmt_fast", "kernels", "bench", "docker", "setup.py")
    for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
)  # fmt: skip
OP = re.compile(r"kernels/cmt_kernels/(\w+)/(\w+)\.py")
FRAME = "def f({}):\n    {}\n{}"


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a call gives; *rest and **more are one each."""
    a = function.args
    named = [p.arg for p in (*a.posonlyargs, *a.args)]
    bound = named[:1] in (["self"], ["cls"])
    return len(named) - bound + len(a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)


def exempt(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The reasons that the module's docstring gives for the kind of function."""
    decorators = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]
    if path.stem.endswith("_kernels") or "triton.jit" in decorators:
        return {"Long", "Many parameters"}
    op = OP.search(path.as_posix())
    same = op is not None and op[2] != "__init__" and function.name in (op[1], "case_of")
    launched = any(d == "torch.library.custom_op" or d.endswith(".register_fake") for d in decorators)
    return {"Many parameters"} if same or launched else set()


def faults(path: Path) -> Iterator[str]:
    """The functions of a file that are beyond a limit without a reason, or give a reason without being so."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text, where = ast.get_docstring(node) or "", f"{path.name}:{node.lineno} {node.name}"
        assert node.end_lineno is not None
        counts = {"Long": (node.end_lineno - node.lineno + 1, LINES), "Many parameters": (parameters(node), PARAMETERS)}
        for word, (count, limit) in counts.items():
            given = re.search(rf"(?:^|\n|[.!?]\s){word}: \w+ \w+", text)
            if count > limit and not given and word not in exempt(path, node):
                yield f"{where} has {count}, more than {limit}; shorten it, or say why in a sentence '{word}: ...'"
            if count <= limit and given:
                yield f"{where} has {count}, at most {limit}; the sentence '{word}: ...' has no cause"


def test_a_function_beyond_a_limit_says_why():
    assert len(FILES) > 300
    assert [f"{path.relative_to(ROOT)}: {fault}" for path in FILES for fault in faults(path)] == []


MANY = ", ".join("abcdefghi")
BODY = "    pass\n" * LINES


@pytest.mark.parametrize(
    "source, said",
    [
        (FRAME.format("a", "'''What.'''", BODY), ["has 62, more than 60"]),
        (FRAME.format("a", "'''What. Long: because.'''", BODY), ["more than 60"]),  # no reason yet
        (FRAME.format("a", "'''What. So Long: it is one.'''", BODY), ["more than 60"]),  # no sentence of its own
        (FRAME.format("a", "'''What. Long: it is one.'''", BODY), []),
        (FRAME.format("a", "pass", BODY[: -2 * len("    pass\n")]), []),  # 60 exactly
        (FRAME.format("a", "'''Long: it is one.'''", ""), ["'Long: ...' has no cause"]),
        (FRAME.format(MANY, "'''What.'''", ""), ["has 9, more than 8"]),
        (FRAME.format(MANY[:-6] + ", *h, **i", "'''What.'''", ""), ["has 9, more than 8"]),
        (FRAME.format("a, *, " + MANY[3:], "'''What.'''", ""), ["has 9, more than 8"]),
        (FRAME.format("self, " + MANY, "'''What.'''", ""), ["has 9, more than 8"]),
        (FRAME.format("self, " + MANY[3:], "'''What.'''", ""), []),
        (FRAME.format(MANY, "'''What.\n\n    Many parameters: they are published.'''", ""), []),
        (FRAME.format("a", "'''Many parameters: they are published.'''", ""), ["has no cause"]),
        (FRAME.format(MANY, "'''What.'''", BODY), ["more than 60", "more than 8"]),
        ("class A:\n    async " + FRAME.format(MANY, "    pass", ""), ["has 9, more than 8"]),
        ("@triton.jit(x=1)\n" + FRAME.format(MANY, "pass", BODY), []),
        ("@torch.library.custom_op('a::b')\n" + FRAME.format(MANY, "pass", BODY), ["more than 60"]),
        ("@f.register_fake\n" + FRAME.format(MANY, "pass", ""), []),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(source, said, tmp_path):
    (tmp_path / "planted.py").write_text(source)
    found = list(faults(tmp_path / "planted.py"))
    assert len(found) == len(said) and all(text in fault for text, fault in zip(said, found)), found


@pytest.mark.parametrize("name, held", [("__init__", True), ("triton", False), ("native", False), ("cases", False)])
def test_an_op_gives_its_reason_once_in_its_public_function(name, held, tmp_path):
    path = tmp_path / "kernels" / "cmt_kernels" / "planted" / f"{name}.py"
    path.parent.mkdir(parents=True)
    path.write_text(FRAME.replace("def f", "def planted").format(MANY, "pass", ""))
    assert bool(list(faults(path))) == held
    path.write_text(FRAME.replace("def f", "def other").format(MANY, "pass", ""))
    assert list(faults(path))
