"""A pytest plugin: `-p bench.harness.gpu_suite.pytest_rows --rows FILE` writes what every test came to
as tests end, failures by name.

Rows are those that failed or crashed; what passed is counted, by file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.harness.results_file import Results

EVERY_S = 1.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, help="the JSON that counts passes and names failures")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rows") and not hasattr(config, "workerinput"):  # in the controller of xdist alone
        config.pluginmanager.register(Rows(config.getoption("--rows")))


class Rows:
    """Counts by file and outcome, and a row for every failure."""

    def __init__(self, path: Path) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.results = Results("tests", device, path, tiny=False, counts={}, finished=False)
        self.written = time.monotonic()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        failed = report.failed
        if report.when != "call" and not failed and not report.skipped:
            return
        counts = self.results.data["counts"].setdefault(report.nodeid.partition("::")[0], {})
        counts[report.outcome] = counts.get(report.outcome, 0) + 1
        if failed:
            self.results.data["rows"].append({"name": report.nodeid, "when": report.when, "failed": last_line(report)})
        if failed or time.monotonic() > self.written + EVERY_S:
            self.results.write()
            self.written = time.monotonic()

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: Any) -> None:
        self.results["finished"] = True


def last_line(report: pytest.TestReport) -> str:
    """What went wrong, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:300]
