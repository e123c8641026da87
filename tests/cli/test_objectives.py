"""`cmt objectives`: every objective is listed, one is shown whole, and a check that fails is an error."""

from __future__ import annotations

import json

from cmt_fast.cli import main, objectives
from cmt_fast.evaluation import rest
from cmt_fast.objectives import OBJECTIVES


def test_all_are_listed(capsys, tmp_path):
    assert main(["objectives", "--json", str(tmp_path / "all.json")]) == 0
    lines, rows = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "all.json").read_text())
    assert list(rows) == list(OBJECTIVES) == [line.split()[0] for line in lines[1 : 1 + len(rows)]]
    assert "digits/post" in rows["ect"]["recipes"] and rows["ecd"]["work"]["forwards"] == 6


def test_one_is_shown_whole_and_checked(capsys):
    assert main(["objectives", "flow", "--check"]) == 0
    out = capsys.readouterr().out
    assert "L = ||u(z_t, t, t) - (eps - x_0)||^2" in out and "pre-training" in out and "digits-mf/pre" in out
    assert out.splitlines()[-1].split()[0::5] == ["flow", "yes"]


def test_one_that_is_not_at_rest_is_an_error(capsys, monkeypatch):
    wrong = rest.CASES["flow"]._replace(known=lambda z, t, r: z)
    monkeypatch.setitem(rest.CASES, "flow", wrong)
    assert main(["objectives", "flow", "--check"]) != 0
    assert "not at rest where they should be: flow" in capsys.readouterr().err


def test_a_name_that_is_none_is_an_error(capsys):
    assert main(["objectives", "meanfow"]) == 2
    assert "meanflow" in capsys.readouterr().err and objectives.ROWS


def test_a_page_shows_an_objective_in_the_plane(tmp_path, capsys):
    """Equation, picture and figures; trained for a moment, from the diffusion model and from mid-training."""
    assert main(["theory", "--pictures", str(tmp_path / "shelf"), "--kinds", "meanflow", "--steps", "3"]) == 0
    text = (tmp_path / "shelf" / "meanflow.md").read_text("utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| meanflow |"))
    assert (
        "u - sg[v - (t - r) du/dt]" in text
        and "![meanflow in the plane](meanflow.png)" in text
        and "Duals of `k` rows" in text
    )
    assert len(row.split("|")) == 10 and all(float(cell) > 0 for cell in row.split("|")[2:-1])
    assert (tmp_path / "shelf" / "meanflow.png").read_bytes()[:4] == b"\x89PNG" and not (tmp_path / "shelf.md").exists()
    assert main(["theory", "--kinds", "meanflow"]) == 2 and "--pictures DIR" in capsys.readouterr().err
