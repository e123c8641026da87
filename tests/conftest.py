"""Every test starts from the same seed on one thread; `gpu` tests are skipped without a CUDA device.

With one, a test that ruins the process's use of it does not take the next ones along (isolation.py). Such a machine may lack
what the trainer needs: files of tests that cannot be imported for it are skipped and say so, those of the kernels run.
"""

import contextlib
import gc
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.fixtures.isolation import Isolation

# nothing is timed to choose a formula by: tests compare bits across processes, whatever runs beside them
os.environ.setdefault("CMT_PROCESSOR", "usual")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.pluginmanager.register(Isolation(config), "isolation")


# files that keep a process busy for minutes: begun first, so that no process is left waiting for another at the end
LONG = ("test_zero", "test_compile", "test_extremes", "test_resume", "test_apart", "test_emulation", "test_recipes", "test_gpu",
        "test_native_gates", "test_cli", "test_isolation", "test_attention_interpreted", "test_gates", "test_transforms",
        "test_small_ops_interpreted", "test_attention_proof", "test_row_ops_interpreted", "test_commands", "test_native",
        "test_runs", "test_cuda_stream", "test_step_graph")  # fmt: skip


NEEDED = (
    "numpy",
    "pydantic",
    "yaml",
    "safetensors",
    "xxhash",
    "rich",
    "PIL",
    "jinja2",
)  # by the trainer, not by the kernels


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Of several processes each imports a share of the files first, and finds the others' compiled when it comes to them.

    In a fresh clone every one of them would compile them all, with asserts taken apart: 10 s a process.
    """
    own = getattr(session.config, "workerinput", None)
    if own is None or session.config.args != session.config.getini("testpaths"):
        return
    root = session.config.rootpath
    files = sorted(root.glob("tests/**/test_*.py"))
    share = int(own["workerid"].removeprefix("gw")) % own["workercount"]
    for file in files[share :: own["workercount"]]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # the collection says what is wrong
            importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] in NEEDED and isinstance(collector, pytest.Module):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), None, f"Skipped: needs {missing[1]}, which is not installed")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))  # stable: within a file nothing moves
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays: no later collection of garbage looks through it, which was 4 % of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # without the three stack traces that torch keeps for devices that are not there: 2 ms of every test
        torch.default_generator.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain_plots() -> Iterator[None]:
    """Curves of reports are empty pictures: drawing them, which tests/report does, takes longer than a small run."""
    from cmt_fast.render import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "svg", lambda *_, **size: "<svg></svg>")
        yield


@pytest.fixture
def nan_poison() -> Iterator[None]:
    """Fresh memory is NaN (the largest integer for integers): what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
