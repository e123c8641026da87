"""Tiny runs of the benches, and the tables that are made of what they write."""

from __future__ import annotations

import argparse
import importlib
import json

import pytest

from bench.__main__ import BENCHES
from bench.harness import tables

SMALL = {
    "step": ["--tiny", "--no-compile", "--seconds", "0"],
    "trajectories": ["--tiny", "--seconds", "0"],
    "pipeline": ["--tiny"],
    "loader": ["--tiny"],
    "predict": [],
}
DEVICELESS = ("predict",)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every bench writes, at its smallest."""
    folder = tmp_path_factory.mktemp("results")
    for name, options in SMALL.items():
        module = importlib.import_module(f"bench.{BENCHES[name][0]}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        where = folder / ("predicted/ops.json" if name in DEVICELESS else f"cpu/{name}.json")
        device = [] if name in DEVICELESS else ["--device", "cpu"]
        code = module.run(parser.parse_args([*device, *options, "--json", str(where)]))
        assert code == 0 or (name in ("pipeline", "loader") and json.loads(where.read_text())["dali"] is None), name
    return folder


@pytest.mark.parametrize("mark", ["step", "trajectories", "pipeline", "loader", "predicted-steps"])
def test_a_table_is_made_of_what_a_bench_wrote(results, mark, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", results / "cpu")
    monkeypatch.setattr(tables, "PAGES", [tmp_path / "README.md"])
    (tmp_path / "README.md").write_text(f"before\n<!-- table: {mark} -->\n<!-- end -->\nafter\n")
    assert tables.run(argparse.Namespace()) == 0
    first, _, *table, _, _ = (tmp_path / "README.md").read_text().splitlines()
    rows = [x for x in table if x.startswith("|")]
    assert first == "before" and len(rows) > 3
    assert len({row.count("|") for row in rows}) == 1, rows


def test_every_row_of_a_step_has_its_figures_and_one_of_ours_is_shipped(results):
    rows = json.loads((results / "cpu/step.json").read_text())["rows"]
    assert {r["objective"] for r in rows} == {"FM", "CMT-CM", "CMT-MF", "MF", "ECT", "ECD"}
    for name in {r["objective"] for r in rows}:
        mine = [r for r in rows if r["objective"] == name]
        theirs = next(r for r in mine if r["how"] == "peer")
        assert sum(r.get("shipped", False) for r in mine) == 1 and theirs["over_peer"] == {}
        for r in mine:
            assert r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] and r["saved_mb"] > 0 and 0 < r["mfu_measured"] < 1
            assert r["gflop_image"] > 0 and r["host_ms"] is None and r["images_per_core_hour"] > r["images_per_s"]
        assert not any(r["precision"] == "bf16" for r in mine) or name not in ("ECT", "ECD")
    saved = {r["how"]: r["saved_mb"] for r in rows if r["objective"] == "MF" and r["precision"] == "fp32"}
    assert saved["peer"] > 1.5 * saved["eager"]  # func.jvp keeps the tangents' graph
    forwards = {(r["how"], r["teacher_forwards"]) for r in rows if r["objective"] == "CMT-CM"}
    assert ("eager", 1.0) in forwards and ("eager, recipe's points", 4.0) in forwards
