"""Who may import whom: the arrows of the house, read off the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = sorted((ROOT / "cmt_fast").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
ALL = OURS + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "bench").rglob("*.py")) + [ROOT / "setup.py"]
ids = lambda p: str(p.relative_to(ROOT))

# module -> what of cmt_fast it may import; a folder's entry holds for every file in it
MAY = {
    "schema": {"schema"},
    "rng": set(),
    "distributed": set(),
    "accounting": {"distributed"},
    "bill": {"accounting", "distributed"},
    "checkpoint": set(),
    "log": set(),
    "pictures": set(),
    "paths": set(),
    "config": {"schema"},
    "ema": {"schema"},
    "facts": {"bill", "schema"},
    "solvers": {"paths"},
    "objectives": {"objectives", "paths", "rng", "schema", "solvers"},
    "models": {"models", "paths", "schema"},
    "codec": {"config"},
    "data": {"checkpoint", "codec", "config", "data", "distributed", "paths", "pictures", "rng", "schema", "solvers"},
    "trajectories": {"distributed", "objectives", "paths", "rng", "schema", "solvers", "trajectories"},
    "tuning": {"config", "distributed", "paths", "rng", "schema", "solvers", "trajectories"},
    "teacher": {"config", "distributed", "machine", "models", "paths", "rng", "schema", "solvers", "trajectories"},
    "sample": {"paths", "rng", "schema", "solvers"},
    "metrics": {"config", "convert", "data", "distributed", "metrics", "schema"},
    "compiled": set(),
    "cards": {"config"},
    "cost": {"cards", "models", "objectives", "schema", "stages", "trajectories"},
    "published": {"cost", "schema"},
    "estimate": {
        "cards",
        "config",
        "cost",
        "data",
        "engine",
        "objectives",
        "published",
        "schema",
        "stages",
        "workspace",
    },
    "engine": {"checkpoint", "compiled", "distributed", "ema", "engine", "optimizer", "schema"},
    "optimizer": {"schema"},
    "posthoc": {"checkpoint", "config", "ema"},
    "plots": set(),
    "augment": {"rng"},
    "perceptual": {"augment", "checkpoint", "config", "models", "rng", "schema"},
    "classifier": {"checkpoint", "config", "data", "distributed", "log", "models", "perceptual", "schema"},
    "convert": {
        "__version__",
        "bill",
        "checkpoint",
        "codec",
        "config",
        "convert",
        "log",
        "models",
        "paths",
        "sample",
        "schema",
        "templates",
        "workspace",
    },
}
# heavy packages and the one module each may be imported in
DOORS = {
    "diffusers": "codec",
    "deepspeed": "engine/zero",
    "nvidia": "data/dali",
    "pynvml": "accounting",
    "sklearn": "data/digits",
    "PIL": "pictures",
    "matplotlib": "plots",
    "tensorboard": "log",
    "triton": "*/triton",
    "torch_fidelity": "metrics/inception",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at import time) for every import in a file."""
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(n) for n in tree.body}
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(a.name, id(node) in top) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in ("cmt_fast", "cmt_fast.data", "cmt_fast.models"):
                out += [(f"{node.module}.{a.name}", id(node) in top) for a in node.names]
            else:
                out.append((node.module, id(node) in top))
    return out


def room(path: Path) -> str:
    return path.relative_to(ROOT / "cmt_fast").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", OURS, ids=ids)
def test_arrows(path):
    modules = [m for m, _ in imports(path)]
    assert not [m for m in modules if m.split(".")[0] in ("tests", "bench")]
    if "kernels" in path.parts:
        assert not [m for m in modules if m.startswith("cmt_fast")]
        near_triton = path.stem in ("triton", "triton_kernels", "assembler")
        assert near_triton or "triton" not in {m.split(".")[0] for m in modules}
    elif room(path) in MAY:
        inner = {m.split(".")[1] for m in modules if m.startswith("cmt_fast.")}
        assert inner <= MAY[room(path)], f"{ids(path)} imports {sorted(inner - MAY[room(path)])}"


# what diffusers runs to load an exported stage: nothing of ours imports it
STANDALONE = ROOT / "cmt_fast/convert/pipeline.py"


@pytest.mark.parametrize("path", [p for p in OURS if p != STANDALONE], ids=ids)
def test_heavy_packages_have_one_door_and_are_imported_late(path):
    for module, at_import in imports(path):
        package = module.split(".")[0]
        if package in DOORS and DOORS[package] != "*/triton":
            assert str(path.relative_to(ROOT / "cmt_fast")).removesuffix(".py") == DOORS[package], module
            assert not at_import or package == "PIL", f"{module} is imported when {ids(path)} is"


@pytest.mark.parametrize("path", ALL, ids=ids)
def test_no_file_above_400_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", OURS, ids=ids)
def test_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), f"{ids(path)} has no module docstring"
    if path.name in ("reference.py", "torch.py", "triton.py", "native.py", "cases.py") and "kernels" in path.parts:
        return  # a backend's docstring is the public function's
    for node in tree.body:
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and path.parent.name != "cli"
        ):
            short = isinstance(node, ast.FunctionDef) and len(node.body) == 1
            assert short or ast.get_docstring(node), f"{ids(path)}: {node.name} has no docstring"


def test_what_reads_pickles_imports_numpy_alone():
    """The sandboxed child starts small, and what it does not have it cannot be made to use."""
    import subprocess
    import sys

    code = "import sys, cmt_fast.safe_pickle.sandbox; print([m for m in ('torch', 'pydantic', 'yaml') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_importing_the_package_is_light():
    import subprocess
    import sys

    heavy = ("diffusers", "sklearn", "matplotlib", "triton", "deepspeed", "nvidia.dali", "torchvision", "tensorboard")
    code = f"import sys, cmt_fast.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
