"""Energy of processors by RAPL's counters, here files of our own; and what one process spends by phase."""

from __future__ import annotations

import pytest

from cmt_fast.usage import meters, rapl
from cmt_fast.usage.meters import Meter, Own


@pytest.fixture
def zones(tmp_path):
    """Two packages, one of which is near its end; what is inside a package or beside it is none."""
    for zone, name, now in (
        ("intel-rapl:0", "package-0", 900),
        ("intel-rapl:1", "package-1", 5_000),
        ("intel-rapl:0:0", "core", 7),
        ("intel-rapl:2", "psys", 7),
    ):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text(f"{now}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000\n")
    return tmp_path


def test_packages_are_added_up_over_the_end_of_their_range(zones):
    counter = rapl.Packages(zones)
    assert counter.read() == 0 and counter.reason == ""
    (zones / "intel-rapl:0" / "energy_uj").write_text("400")  # 999,500 uJ on: it began again
    (zones / "intel-rapl:1" / "energy_uj").write_text("7500")
    (zones / "intel-rapl:2" / "energy_uj").write_text("999999")
    assert counter.read() == (999_500 + 2_500) // 1000
    (zones / "intel-rapl:1" / "energy_uj").unlink()
    assert counter.read() is None and "failed at times" in counter.reason


def test_no_counter_says_why(zones, tmp_path, monkeypatch):
    none = rapl.Packages(tmp_path / "nothing")
    assert none.read() is None and "no energy of its processors" in none.reason

    def refuse(file):
        if file.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(file))
        return file.read_text().strip()

    monkeypatch.setattr(rapl, "_text", refuse)
    refused = rapl.Packages(zones)
    assert refused.read() is None and refused.reason.endswith("energy_uj can be read by root alone")


def test_what_a_process_spends_is_kept_by_phase(monkeypatch):
    """Processor seconds of a stretch go to its parts by their time; nothing of it is taken away by the bill."""
    clock, cpu = iter([0.0, 2.0, 6.0, 10.0, 14.0]), iter([1.0, 6.0, 7.0])
    monkeypatch.setattr(meters, "process_time", lambda: next(cpu))
    joules = iter([0, 20_000, 21_000])
    counter = type("Joules", (), {"read": lambda self: next(joules), "reason": ""})()
    meter = Meter("core", 1, counter, clock=lambda: next(clock))
    with meter.within("teacher"):
        pass
    meter.lap("train")
    meter.take()
    meter.lap("evaluation")
    assert meter.own == {"teacher": Own(4.0, 2.0, 8.0), "train": Own(6.0, 3.0, 12.0), "evaluation": Own(4.0, 1.0, 1.0)}
