"""Tables of a card's results: made of what the benches write, and said to be missing where nothing was measured."""

from __future__ import annotations

import argparse
import json
import re

import pytest

from bench.harness import gpu_tables, tables

ABOUT = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11", "cuda": "13.0", "commit": "abc", "date": "2026-11-27T00:00",
         "not_measured": []}  # fmt: skip
STEP = {
    "objective": "MF", "model": "XL256", "tokens": 256, "width": 1152, "depth": 28, "batch": 64, "how": "eager",
    "precision": "bf16", "p50_ms": 200.0, "images_per_s": 320.0, "mfu_datasheet": 0.25, "mfu_measured": 0.31, "host_ms": 160.0,
    "peak_gb": 41.0, "compile_s": None, "predicted_us": 2000.0, "measured_over_predicted": 1.5625,
    "over_peer": {"bf16": {"p20": 2.0, "p50": 2.5, "p80": 3.0}}, "over_peer_by": "medians of 4 alternating rounds, two processes",
}  # fmt: skip
FILES = {
    "step.json": {"rows": [STEP, STEP | {"how": "peer", "over_peer": {}, "over_peer_by": ""}]},
    "step-xl1024.json": {"rows": [{k: STEP[k] for k in ("objective", "model", "batch", "how", "precision")} | {"cannot": "no"}]},
    "sweep.json": {
        "backend": "triton", "sanitizer": {"shapes": 2, "errors": 1},
        "rows": [
            {"T": 64, "d": 72, "dtype": "bf16", "wrong": ["tangent"], "error": {}},
            {"T": 16, "d": 40, "dtype": "bf16", "crash": "killed by SIGSEGV"},
            {"T": 256, "d": 72, "dtype": "bf16", "wrong": [], "error": {"value": 2e-3, "tangent": 3e-3, "gradient": 4e-3},
             "proof_ms": 12.0},
            {"T": 100, "d": 72, "dtype": "bf16", "wrong": [], "error": {"value": 2e-3, "tangent": 3e-3, "gradient": 4e-3},
             "proof_ms": 40.0},
            {"T": 256, "d": 72, "dtype": "bf16", "wrong": [], "error": {}, "under": "compute-sanitizer"},
        ],
    },
    "ops.json": {
        "spread_median": 0.013,
        "rows": [
            {"op": "gelu", "case": "B64", "dtype": "bfloat16", "backend": name, "p50_ms": ms, "predicted_ms": 0.067,
             "measured_over_predicted": ms / 0.067, "host_ms": 0.05}
            for name, ms in (("native", 0.1), ("triton", 0.09), ("compiled", 0.08), ("reference", 0.3), ("apex", 0.07))
        ],
    },
    "trajectories.json": {
        "rows": [{"model": "XL256", "mode": "pool", "how": "graph", "precision": "bf16", "at_once": 64,
                  "trajectories_per_s": 96.0, "p50_ms_image": 0.65, "paper_over": {"p20": 11.0, "p50": 11.5, "p80": 12.0}}],
    },
    "pipeline.json": {
        "rows": [{"run": "digits", "stage": "pre", "bare_images_per_s": 3160.0, "loop_images_per_s": 2462.0, "loses": 0.22,
                  "around_s": 0.5}],
    },
    "train.json": {
        "rows": [{"recipe": "digits", "exit": 0, "report": True, "seconds": 200.0,
                  "figures": {"mid": {"1": {"frechet": 0.33}, "2": {"frechet": 0.4}}}}],
    },
}  # fmt: skip


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """write(names) -> the page with their tables."""
    (tmp_path / "cpu").mkdir()
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "cpu")
    monkeypatch.setattr(tables, "PAGES", [tmp_path / "README.md"])

    def write(*names: str) -> str:
        marks = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names)
        (tmp_path / "README.md").write_text(marks)
        assert tables.run(argparse.Namespace()) == 0
        return (tmp_path / "README.md").read_text()

    return write


def test_what_no_card_has_measured_says_how(pages):
    text = pages(*(f"h100-{name}" for name in gpu_tables.TABLES))
    for part in gpu_tables.TABLES:
        assert f"Not measured yet; on such a card: `python -m bench gpu {part}`." in text
    with pytest.raises(KeyError):
        pages("h100-oops")


def test_tables_of_a_card(pages, tmp_path):
    (tmp_path / "h100").mkdir()
    for name, data in FILES.items():
        (tmp_path / "h100" / name).write_text(json.dumps(ABOUT | data))
    seeds = [{"stages": {"mid": {"1": {"frechet": f}}}} for f in (0.3, 0.4)]
    (tmp_path / "cpu" / "digits-seeds.json").write_text(json.dumps({"seeds": seeds}))
    text = pages(*(f"h100-{name}" for name in gpu_tables.TABLES))
    assert (
        "| XL256 MF eager bf16 | 64 | 200.0 | 320 | 25.0% | 31.0% | 160 | 41.0 |  | 500 | 1.56 | 2.50, equal batch |"
        in text
    )
    assert "| XL256 MF published way bf16 | 64 |" in text and "| 64 | no |" in text
    assert "| bf16 | 4 | 16 to 256, 40 to 72 | 2 | 1 | 1 | 2.0e-03 | 3.0e-03 | 4.0e-03 |" in text
    assert "**bf16 T 64, d 72**: wrong tangent" in text and "**bf16 T 16, d 40**: killed by SIGSEGV" in text
    assert "2 shapes, 1 errors" in text and "of each of 2 shapes: 26 ms in the median, 40 at most" in text
    assert (
        "| gelu B64 bfloat16 | 0.1000 | 0.0900 | 0.3000 | 0.0800 | 0.0700 (apex) | apex | 0.0670 | 1.34 | 0.050, 0.050 |"
        in text
    )
    assert "1.3%" in text and "| digits, mid-training | 1 | 0.33 | 0.30 / 0.40 |" in text
    assert "| XL256 pool graph bf16 | 64 | 96.0 | 0.65 | 11.50 (11.00 to 12.00) |" in text
    assert "| digits, pre | 3,160 | 2,462 | 22% | 0.5 |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({row.count("|") for row in block.splitlines()}) == 1, block


def test_an_op_that_another_file_measured_is_not_missing(pages, tmp_path):
    (tmp_path / "h100").mkdir()
    left = ABOUT | FILES["ops.json"] | {"not_measured": ["qk_norm B64 bfloat16", "attention B64 bfloat16"]}
    row = FILES["ops.json"]["rows"][0] | {"op": "qk_norm", "case": "B64", "dtype": "bfloat16"}
    (tmp_path / "h100" / "ops.json").write_text(json.dumps(left))
    (tmp_path / "h100" / "ops-qk_norm.json").write_text(json.dumps(ABOUT | {"rows": [row]}))
    assert "Not measured: attention B64 bfloat16." in pages("h100-ops")


def test_a_proof_in_a_new_process_stands_apart(pages, tmp_path):
    (tmp_path / "h100").mkdir()
    shared = {
        "network": "XL",
        "dtype": "bf16",
        "process": "shared",
        "ms": {"forward": 300.0, "backward": 100.0},
        "start_ms": 9.0,
    }
    rows = [
        shared,
        shared | {"network": "B", "ms": {"forward": 2.0}},
        shared | {"process": "new", "ms": {"forward": 250.0}},
    ]
    (tmp_path / "h100" / "proofs.json").write_text(json.dumps(ABOUT | {"rows": rows}))
    text = pages("h100-proofs")
    assert "| XL bf16 |  | 250 | 9 |" in text and "| B bf16 | 2 |  |  |" in text


def test_what_is_missing_is_said_below_the_table(pages, tmp_path):
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "step.json").write_text(
        json.dumps(ABOUT | {"rows": [STEP], "not_measured": ["FM XL256 compiled"]})
    )
    assert "Not measured: FM XL256 compiled." in pages("h100-step")
