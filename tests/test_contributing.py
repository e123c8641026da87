"""What CONTRIBUTING.md tells a newcomer to write works as it stands there: its op, its objective, its data format."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import cmt_kernels
import pytest
import torch

from cmt_fast import objectives
from cmt_fast.config import schema
from cmt_fast.config.schema import data as data_schema
from cmt_fast.config.schema import objective as objective_schema
from cmt_fast.evaluation import rest
from cmt_fast.objectives import counting

GUIDE = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text("utf-8")


def blocks(section: str) -> dict[str, str]:
    """The Python of a section, by the file that it goes to."""
    text = GUIDE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"```python\n# ([\w/.]+\.py)[^\n]*\n(.*?)```", text, flags=re.S)
    return dict(found)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """module(name, source): a module that the guide writes; into(module, source): what it adds to one that is there."""
    before = set(sys.modules)

    def module(name: str, source: str) -> types.ModuleType:
        made = types.ModuleType(name)
        exec(compile("from __future__ import annotations\n" + source, name, "exec"), made.__dict__)
        return made

    def into(there: types.ModuleType, source: str) -> None:
        known = {**vars(there)}
        exec(compile(source, there.__name__, "exec"), known)
        for name in set(known) - set(vars(there)):
            monkeypatch.setattr(there, name, known[name], raising=False)
            monkeypatch.setattr(schema, name, known[name], raising=False)

    yield types.SimpleNamespace(module=module, into=into)
    for name in set(sys.modules) - before:
        if "softplus" in name:
            del sys.modules[name]


def test_the_objective_of_the_guide_is_at_rest_at_the_answer_alone(written, monkeypatch) -> None:
    found = blocks("An objective")
    assert list(found) == [
        "cmt_fast/config/schema/objective.py", "cmt_fast/objectives/weighted_flow.py", "cmt_fast/objectives/__init__.py",
        "cmt_fast/evaluation/rest.py",
    ]  # fmt: skip
    keys, own, row, case = found.values()
    written.into(objective_schema, keys)
    made = written.module("cmt_fast.objectives.weighted_flow", own)
    spec = eval(f"{{{row}}}", {**vars(objectives), "weighted_flow": made})
    monkeypatch.setitem(objectives.OBJECTIVES, "weighted_flow", spec["weighted_flow"])
    cases = eval(f"{{{case}}}", {**vars(rest), "WeightedFlow": schema.WeightedFlow})
    monkeypatch.setitem(rest.CASES, "weighted_flow", cases["weighted_flow"])
    assert rest.measure("weighted_flow").holds
    assert spec["weighted_flow"].equation.startswith("L = (1 + t)^power")
    assert counting.work(schema.WeightedFlow(), rest.LINEAR, 8) == counting.work(schema.Flow(), rest.LINEAR, 8)
    weighed, plain = (rest.gradients_of(kind, theta=1.0).abs().sum() for kind in ("weighted_flow", "flow"))
    assert weighed > 1.2 * plain  # rows weigh between 1 and 2


def test_the_op_of_the_guide_is_softplus(written, tmp_path, monkeypatch) -> None:
    for name, source in blocks("An op").items():
        path = tmp_path / Path(name).relative_to("kernels/cmt_kernels")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, "utf-8")
    monkeypatch.setattr(cmt_kernels, "__path__", [*cmt_kernels.__path__, str(tmp_path)])
    from cmt_kernels.softplus.reference import softplus  # type: ignore[import-not-found]

    x, x_dot = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    y = softplus(cmt_kernels.Dual(x, x_dot))
    exact, along = torch.func.jvp(lambda x: torch.log1p(x.exp()), (x[:2],), (x_dot,))
    torch.testing.assert_close(y.value[:2], exact)
    torch.testing.assert_close(y.tangent, along)
    torch.testing.assert_close(softplus(x), y.value)


def test_the_data_format_of_the_guide_reads_a_text_file(written, tmp_path) -> None:
    keys, own = blocks("A data format").values()
    written.into(data_schema, keys)
    read = written.module("cmt_fast.data.csv", own)
    (tmp_path / "a.csv").write_text("0,0,255,0,255\n1,255,255,255,255\n", "utf-8")
    rows = read.load(schema.Csv(str(tmp_path / "a.csv"), 2))
    assert rows.x.shape == (2, 1, 2, 2) and rows.x.flatten().tolist() == [-1, 1, -1, 1, 1, 1, 1, 1]
    assert rows.labels.tolist() == [0, 1] and rows.classes == 2
    with pytest.raises(ValueError, match="data.side: 3 needs 10 columns, the file has 5"):
        read.load(schema.Csv(str(tmp_path / "a.csv"), 3))
