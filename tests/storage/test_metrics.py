"""metrics.jsonl: rows are given back whole, a start cuts and rewrites nothing, and what is held of a long file is small."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from cmt_fast.render import thin
from cmt_fast.storage import metrics_log, record
from cmt_fast.storage.metrics_log import METRICS, Log
from cmt_fast.storage.record import RECENT, Record
from cmt_fast.usage.bills import PHASES, Amount, Usage


def bill(n: int, joules: bool = True) -> dict:
    """Of a process that has taken n steps: most phases stand still, as they do."""
    spent = {
        phase: Amount(10.0 + i, 1e6 / 3 if joules else None, 0.0 if joules else 10.0 + i)
        for i, phase in enumerate(PHASES)
    }
    spent["train"] = spent["train"].plus(Amount(n / 3, n * 777.7 if joules else None, 0.0 if joules else n / 3))
    if n % 7 == 0:
        spent["evaluation"] = spent["evaluation"].plus(
            Amount(n / 9, 2.0 * n if joules else None, 0.5 if joules else n / 9)
        )
    return Usage({"gpu": spent}, until=1.8e9 + n / 3).stored()


def train_row(log: Log, n: int, loss: float = 0.1, joules: bool = True) -> None:
    values = {"loss": loss / n, "grad_norm": 1.0, "lr": 1e-4}
    log.row(
        "train", n, 64 * n, values, {"train_s": n / 3, "eval_s": 0.0, "images_per_s": 192.0, "bill": bill(n, joules)}
    )


def write(folder: Path, steps, after: int = 0, joules: bool = True) -> Path:
    """Rows of these steps by a process of its own, every fifth with an evaluation."""
    log = Log(folder, after, write=True)
    for n in steps:
        train_row(log, n, joules=joules)
        if n % 5 == 0:
            log.row("eval", n, 64 * n, {"steps": {"1": {"frechet": 1.0 / n}}})
    log.close()
    return folder / METRICS


@pytest.fixture
def stage(tmp_path) -> Path:
    (tmp_path / "mid").mkdir()
    return tmp_path / "mid"


@pytest.mark.parametrize("joules", [True, False], ids=["energy known", "energy unknown"])
def test_the_bill_of_every_row_comes_back_from_what_came_onto_it(stage, joules):
    file = write(stage, range(1, 31), joules=joules)
    write(stage, range(21, 61), after=20, joules=joules)
    rows = [row for row in metrics_log.read(file) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 61))
    for row in rows:
        found, wanted = Usage.of(row["wall"]["bill"]), Usage.of(bill(row["step"], joules))
        assert found.until == pytest.approx(wanted.until, abs=1e-3) and found.reason == wanted.reason
        for phase, amount in wanted.amounts["gpu"].items():
            assert found.amounts["gpu"][phase] == pytest.approx(amount, abs=1e-3), (row["step"], phase)
    lines = [line for line in file.read_bytes().splitlines() if b'"train","step"' in line]
    whole = len(json.dumps(rows[-1]))
    seal = len(b',"xxh32":"01234567"')
    assert sum(map(len, lines)) / len(lines) - seal < whole / 3  # most of a row was its bill


def test_a_start_cuts_the_file_where_its_checkpoint_ends_and_touches_nothing_before(stage, monkeypatch):
    file = write(stage, range(1, 2001))
    before, node = file.read_bytes(), file.stat().st_ino
    with open(file, "ab") as f:
        f.write(b'{"kind": "train", "step": 2001, "ni')  # torn by a kill
    parsed = []
    monkeypatch.setattr(
        metrics_log, "parsed", lambda line, of, real=metrics_log.parsed: parsed.append(line) or real(line, of)
    )
    Log(stage, 1990, write=True).close()
    assert len(parsed) <= 2000 - 1990 + 2 + 1 and file.stat().st_ino == node  # the lost rows and the last that is kept
    left = file.read_bytes()
    assert before.startswith(left) and json.loads(left.splitlines()[-1])["step"] == 1990 and left.endswith(b"\n")
    assert json.loads(left.splitlines()[-1])["kind"] == "eval"  # that of the checkpoint's own step stays
    Log(stage, 0, write=True).close()  # no checkpoint: nothing counts
    assert file.read_bytes() == b""


def test_an_evaluation_that_the_checkpoint_came_before_is_not_there_twice(stage):
    """Made up for by a process that was killed before its own checkpoint: the next one makes up for it again."""
    file = write(stage, range(1, 11))
    with open(file, "a", encoding="utf-8") as f:
        f.write('{"of": "another tool"}\n')
    log = Log(stage, 10, write=True, unseen=True)
    assert [r["kind"] for r in metrics_log.read(file)[-2:]] == ["train", "train"]
    log.row("eval", 10, 640, {"steps": {"1": {"frechet": 0.1}}})
    log.close()
    assert [r["step"] for r in Record.of(file).kind("eval")] == [5, 10]
    Log(stage, 10, write=True).close()
    assert [r["step"] for r in Record.of(file).kind("eval")] == [5, 10]


def test_a_file_of_an_earlier_version_is_read_and_gone_on_with(stage):
    old = [{"kind": "train", "step": n, "nimg": 64 * n, "loss": 1 / n, "lr": 1e-4,
            "wall": {"train_s": n / 3, "eval_s": 0.0, "images_per_s": 192.0, "bill": bill(n)}} for n in range(1, 9)]  # fmt: skip
    file = stage / METRICS
    file.write_text("".join(json.dumps(row) + "\n" for row in old), encoding="utf-8")
    assert metrics_log.read(file) == old
    write(stage, range(6, 9), after=5)
    rows = metrics_log.read(file)
    assert [r["step"] for r in rows] == list(range(1, 9)) and rows[:5] == old[:5]
    assert Usage.of(rows[7]["wall"]["bill"]).total("gpu") == pytest.approx(Usage.of(bill(8)).total("gpu"), abs=0.01)
    found = Record.of(file)
    assert list(found.nimg) == [64 * n for n in range(1, 9)] and found.first == old[0]


def test_a_line_that_is_none_is_left_out_and_bills_after_it_are_unknown_until_a_whole_one(stage):
    file = write(stage, range(1, 9))
    lines = file.read_bytes().splitlines(keepends=True)
    lines[3] = b"\0" * 40 + b"\n"  # of a disk that lost power
    file.write_bytes(b"".join(lines))
    write(stage, range(9, 10), after=8)
    rows = [r for r in metrics_log.read(file) if r["kind"] == "train"]
    assert [r["step"] for r in rows] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert ["bill" in r["wall"] for r in rows] == [True] * 3 + [False] * 4 + [True]
    assert [n // 64 for n in Record.of(file).nimg] == [1, 2, 3, 5, 6, 7, 8, 9]


def test_a_record_says_what_the_rows_say(stage, monkeypatch):
    monkeypatch.setattr(record, "BLOCK", 1000)  # rows lie across its ends
    file = write(stage, range(1, 101))
    with open(file, "a", encoding="utf-8") as f:  # what is not written so today
        f.write('{"kind": "train", "step": 101, "nimg": 6464, "loss": NaN, "lr": 0.5, "wall": {"train_s": 1.0}}\n')
        f.write('{"kind": "train", "step": 102, "loss": null, "nimg": 6528, "wall": {}}\n')
    rows = metrics_log.read(file)
    train = [r for r in rows if r["kind"] == "train"]
    found = Record.of(file)
    np.testing.assert_array_equal(found.loss, [np.nan if r["loss"] is None else r["loss"] for r in train])
    np.testing.assert_array_equal(found.lr, [r.get("lr", np.nan) for r in train])
    assert list(found.nimg) == [r["nimg"] for r in train] and len(found) == len(rows) and found.last_nimg == 6528
    assert found.kind("eval") == [r for r in rows if r["kind"] == "eval"]
    assert [r["step"] for r in found.recent] == [r["step"] for r in train[-RECENT:]] and found.first["step"] == 1
    newest = Record.newest(file)
    assert newest.last_nimg == 6528 and newest.kind("eval") == found.kind("eval")[-1:] and newest
    assert not Record.newest(stage / "none") and not Record.of(stage / "none")


def test_who_watches_reads_what_is_new_and_all_of_a_file_that_was_cut_meanwhile(stage, monkeypatch):
    file, seen = write(stage, range(1, 11)), []
    monkeypatch.setattr(
        Record, "_take", lambda self, lines, real=Record._take: seen.append(len(lines)) or real(self, lines)
    )
    watched = Record(file).update()
    assert seen == [12] and list(watched.nimg) == [64 * n for n in range(1, 11)]
    with open(file, "a", encoding="utf-8") as f:
        f.write('{"kind": "train", "step": 11,')
        f.flush()
        assert len(watched.update()) == 12 and seen == [12]  # not whole yet
        f.write(' "nimg": 704, "loss": 1.5, "lr": 0.1, "wall": {"train_s": 4.0}}\n')
    assert watched.update().loss[-1] == 1.5 and seen == [12, 1]
    log = Log(stage, 8, write=True)  # a resume: shorter, then as long as before with other rows
    for n in range(9, 15):
        train_row(log, n, loss=0.7)
    log.close()
    assert list(watched.update().loss) == [r["loss"] for r in metrics_log.read(file) if r["kind"] == "train"]
    other = stage / "other"
    other.write_text('{"kind": "eval", "step": 1, "nimg": 1}\n' * 100, encoding="utf-8")
    os.replace(other, file)  # another file, as of a version that wrote it anew
    assert len(watched.update()) == 100 and not watched.nimg
    file.unlink()
    assert len(watched.update()) == 100


def test_rows_of_fp16_are_columns_as_others_are(stage, monkeypatch):
    log = Log(stage, 0, write=True)
    values = {"loss": 0.5, "lr": 1e-4, "loss_scale": 65536.0, "skipped_steps": 3}
    log.row("train", 1, 64, values, {"train_s": 1.0, "bill": bill(1)})
    log.close()
    monkeypatch.setattr(Record, "_other", None)
    found = Record.of(stage / METRICS)
    assert (list(found.nimg), list(found.loss), list(found.lr)) == ([64], [0.5], [1e-4])


def test_a_file_that_is_replaced_while_it_is_opened_is_read_again(stage, monkeypatch):
    """Its first bytes are those of the file before: only which file was read tells them apart."""
    file = write(stage, range(1, 5))
    other, real = stage / "other", Path.stat
    text = file.read_bytes().replace(b'"step":2', b'"step":7').replace(b'"nimg":128', b'"nimg":129')
    whole = (re.sub(rb',"xxh32":"[0-9a-f]{8}"', b"", line).decode() for line in text.splitlines())
    other.write_text("".join(f"{metrics_log.sealed(line)}\n" for line in whole), "utf-8")

    def replaced(path, **how):
        if other.exists() and path == file:
            other.replace(file)
        return real(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda p: os.path.exists(p))
        patch.setattr(Path, "stat", replaced)
        watched = Record(file).update()
    if other.exists():
        other.replace(file)
    assert list(watched.update().nimg) == [64, 129, 192, 256]


def test_a_long_file_is_read_in_little_time_and_memory(stage):
    """Ratios in one process: against parsing every row, which is what a report did."""
    import tracemalloc

    file, n = write(stage, range(1, 501)), 40
    file.write_bytes(file.read_bytes() * n)

    def cost(call) -> tuple[float, int]:
        start = time.process_time()
        kept = call()
        took = time.process_time() - start
        del kept
        tracemalloc.start()
        kept = call()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del kept
        return took, held

    (slow, much), (fast, little) = cost(lambda: metrics_log.read(file)), cost(lambda: Record.of(file))
    assert little < much / 5 and fast < slow / 2


def test_a_thinned_curve_keeps_every_spike_and_both_ends():
    y = np.sin(np.arange(100_000) / 999.0)
    spikes = {12_345: 9.0, 77_777: -9.0, 77_778: 9.5, 99_998: 30.0}
    for at, value in spikes.items():
        y[at] = value
    xs, ys = thin.extremes(range(100_000), y)
    assert len(xs) <= 2 * thin.BINS + 2 and xs == sorted(xs) and (xs[0], xs[-1]) == (0, 99_999)
    assert all(value in ys for value in spikes.values()) and all(y[x] == v for x, v in zip(xs, ys))
    short = list(range(2 * thin.BINS))
    assert thin.extremes(short, short) == (short, short)
    for bad in (np.nan, np.inf, -np.inf):  # beside a spike, which stays
        y[77_700] = bad
        shown = thin.extremes(range(100_000), y)[1]
        assert any(v == bad or (v != v and bad != bad) for v in shown) and {9.5, -9.0} <= set(shown)
