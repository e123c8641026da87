"""A step whose form a schedule changes: each form is a CUDA graph of its own, recorded and proven when it begins."""

from __future__ import annotations

from tests.engine.test_step_graph import PROVEN, Training, differing
from tests.fixtures.tape import Tape, tape

__all__ = ["tape"]


def test_a_schedule_of_forms_is_a_graph_of_each(tape: Tape) -> None:
    """AlphaFlow's two steps of flow matching, two of a share alpha, two of MeanFlow: told apart by name, equal to the bit."""
    key = "post.objective={kind: alphaflow, begin: 0.05, end: 0.2}"
    ours, plain = (Training("alphaflow, guided", None, "post.label_dropout=0", key) for _ in range(2))
    forms = [plain.source.draw(step).own.form for step in range(6)]
    assert [forms.count(form) for form in dict.fromkeys(forms)] == [2, 2, 2]
    ours.take(ours.graph(), 6)
    plain.take(plain.eager, 6)
    assert ours.lines == 3 * [f"    post {PROVEN}"] and differing(ours, plain) == []
