"""A test that ruins the process's CUDA context is found, named and left alone with it: the tests after it run elsewhere.

After some errors on a GPU (a misaligned or an illegal address) every later call in the same process fails with the same
words, whoever makes it. So the device is waited for at the end of each test marked gpu, where such an error becomes that
test's own. If the device cannot be used after it,

* a process of pytest-xdist ends at once: xdist names the test and goes on in a new one. Some of its schedulers give the same
  test out again with the rest of its file; a test that was begun once and never finished is not begun again;
* a pytest without xdist runs the tests that are left in a new process and takes over what that reports. That process ends
  in the same way and is followed by another; a test that kills it is named as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = "CMT_TESTS_LEFT"  # variable: what a process that goes on runs, and beside it what it reports
RUINED = 86  # exit code of a process that cannot use its GPU any more


def initialized() -> bool:
    return torch.cuda.is_initialized()


def ruined() -> str | None:
    """Why this process cannot use its GPU any more, or None. An error that is told once and then forgotten ruins nothing."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).split("\n")[0]
    return None


class Isolation:
    """The pytest plugin."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.goes_on = Path(os.environ[FILE]) if FILE in os.environ else None
        self.xdist = hasattr(config, "workerinput")
        self.begun = Path(config.option.basetemp).parent / "begun" if self.xdist and config.option.basetemp else None
        self.on_gpu = False  # whether the test that runs is
        self.culprit = ""
        self.elsewhere: dict[str, list[pytest.TestReport]] | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.goes_on:
            wanted = set(json.loads(self.goes_on.read_text()))
            items[:] = [item for item in items if item.nodeid in wanted]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.on_gpu = "gpu" in item.keywords
        result = yield
        if self.on_gpu and initialized():
            torch.cuda.synchronize()  # what the test has started fails here, in its name
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.goes_on:
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with _reports(self.goes_on).open("a") as file:
                file.write(json.dumps(data, default=str) + "\n")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        on_gpu, self.on_gpu = self.on_gpu, False
        if on_gpu and initialized() and ruined():
            if self.xdist or self.goes_on:
                os._exit(RUINED)
            self.culprit = nodeid
        if self.begun:
            self._note(nodeid).unlink(missing_ok=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self.begun and "gpu" in item.keywords:
            if self._note(item.nodeid).exists():
                return True  # it has been named
            self.begun.mkdir(exist_ok=True)
            self._note(item.nodeid).touch()
        if not self.culprit:
            return None
        if self.elsewhere is None:
            items = item.session.items
            self.elsewhere = self._run_elsewhere([left.nodeid for left in items[items.index(item) :]])
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.elsewhere.get(item.nodeid, []):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.culprit:
            terminalreporter.line(
                f"{self.culprit} left the GPU unusable to its process: the tests after it ran in another"
            )

    def _note(self, nodeid: str) -> Path:
        return self.begun / hashlib.sha256(nodeid.encode()).hexdigest()

    def _run_elsewhere(self, left: list[str]) -> dict[str, list[pytest.TestReport]]:
        """The reports of these tests by name, from one process after the other."""
        found: dict[str, list[pytest.TestReport]] = {}
        while left:
            found |= self._run(left)
            done = {name for name, reports in found.items() if reports[-1].when == "teardown"}
            missing = [name for name in left if name not in done]
            if len(missing) == len(left) or self.code != RUINED:
                for name in missing[:1]:
                    found[name] = [*found.get(name, []), self._crash(name)]
                missing = missing[1:]
            left = missing
        return found

    def _run(self, left: list[str]) -> dict[str, list[pytest.TestReport]]:
        found: dict[str, list[pytest.TestReport]] = {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "left.json"
            file.write_text(json.dumps(left))
            _reports(file).touch()
            command = [sys.executable, "-m", "pytest", *map(str, self.config.invocation_params.args)]
            done = subprocess.run(
                command, cwd=self.config.invocation_params.dir, env={**os.environ, FILE: str(file)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
            self.code, self.output = done.returncode, done.stdout
            for line in _reports(file).read_text().splitlines():
                hook = self.config.hook.pytest_report_from_serializable
                report = hook(config=self.config, data=json.loads(line))
                if isinstance(report.longrepr, list):
                    report.longrepr = tuple(report.longrepr)  # of a skip; JSON has no tuples
                found.setdefault(report.nodeid, []).append(report)
        return found

    def _crash(self, name: str) -> pytest.TestReport:
        end = "\n".join(self.output.splitlines()[-20:])
        text = f"the process ended while it ran {name}, exit code {self.code}\n{end}"
        return pytest.TestReport(name, (name.split("::")[0], None, name), {}, "failed", text, "call")


def _reports(file: Path) -> Path:
    return file.with_suffix(".reports")
