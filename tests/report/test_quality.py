"""What a page says of figures, of made-up ones."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from cmt_fast.report import judged, quality


@pytest.mark.parametrize(
    "post, control, said",
    [(30, 30, "after as many student images (30)"), (3000, 20, "after 3,000 student images against 20")],
)
def test_images_of_both_are_said_where_they_differ(post, control, said):
    stands = {"post": SimpleNamespace(path=("", post)), "control": SimpleNamespace(path=("", control))}
    assert quality._images(stands) == said


def test_figures_of_other_weights_or_of_an_older_measure_are_not_taken(tmp_path):
    work = SimpleNamespace(folder=tmp_path, stage_dir=lambda name: tmp_path / name)
    stage = lambda ema: SimpleNamespace(name="post", ema=ema)
    (tmp_path / "post").mkdir()

    def told(ema: str, measures: int) -> bool:
        body = {"key": {"ema": "a", "measures": measures}, "few": {}, "solver": {}, "during": {}, "left_out": {}}
        (tmp_path / "post" / judged.FIGURES).write_text(json.dumps(body), encoding="utf-8")
        return judged.known(work, stage(ema), tmp_path) is not None

    assert told("a", judged.MEASURES)
    assert not told("a", judged.MEASURES - 1) and not told("b", judged.MEASURES) and not told("", judged.MEASURES)
