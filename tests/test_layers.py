"""The house: every module is in a room, who may import whom, what is imported late, how long files are.

Rooms come from paths relative to the repository, so a clone may stand anywhere. ARROWS is the one table of imports.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for top in ("cmt_fast", "kernels", "bench", "tests")
    for path in (ROOT / top).rglob("*.py")
    if "ptx" not in path.parts and path != ROOT / "kernels" / "setup.py"  # of a distribution, as setup.py: no module
)
OURS = [path for path in FILES if path.parts[0] in ("cmt_fast", "kernels")]

# room -> rooms that it may import, itself aside; the order is the house's, from the ground up
ARROWS: dict[str, set[str]] = {
    "cmt_kernels": set(),
    "cmt_fast": set(),  # the version
    "config": set(),
    "storage": {"config"},
    "runtime": {"cmt_fast", "config", "storage"},
    "render": {"runtime", "storage"},
    "safe_pickle": set(),
    "schedule": {"config"},
    "diffusion": {"config"},
    "models": {"config", "diffusion"},
    "objectives": {"config", "diffusion"},
    "data": {"config", "diffusion", "render", "runtime", "storage"},
    "perceptual": {"config", "data", "diffusion", "models", "runtime", "storage"},
    "engine": {"config", "runtime", "storage"},
    "teacher": {"config", "diffusion", "models", "objectives", "runtime", "storage"},
    "usage": {"runtime", "storage"},
    "evaluation": {"config", "data", "diffusion", "objectives", "runtime", "safe_pickle", "storage"},
    "run": {"config", "data", "diffusion", "engine", "evaluation", "models", "objectives", "perceptual", "render", "runtime",
            "schedule", "storage", "teacher", "usage"},
    "train": {"config", "data", "diffusion", "engine", "evaluation", "objectives", "perceptual", "render", "run", "runtime",
              "schedule", "storage", "teacher", "usage"},
    "cost": {"config", "data", "engine", "models", "objectives", "run", "runtime", "schedule", "storage", "teacher"},
    "report": {"config", "evaluation", "render", "run", "runtime", "storage", "teacher", "train", "usage"},
    "watch": {"config", "run", "runtime", "storage"},
    "convert": {"cmt_fast", "config", "data", "diffusion", "models", "render", "run", "runtime", "safe_pickle",
                "storage", "usage"},
    "api": {"config", "diffusion", "engine", "run", "runtime", "teacher", "train"},
    "speedrun": {"api", "config", "cost", "evaluation", "run", "runtime", "schedule", "storage", "train", "usage"},
    "cli": {"any"},
    "bench": {"any"},
    "tests": {"any"},
}  # fmt: skip
TOPS = ("bench", "tests")  # nothing imports them
# heavy packages and the one module each may be imported in, late
DOORS = {
    "diffusers": "cmt_fast/data/autoencoder",
    "deepspeed": "cmt_fast/engine/zero",
    "nvidia": "cmt_fast/data/dali",
    "pynvml": "cmt_fast/usage/meters",
    "sklearn": "cmt_fast/data/digits",
    "PIL": "cmt_fast/render/grids",
    "matplotlib": "cmt_fast/render/plots",
    "tensorboard": "cmt_fast/storage/loggers/to_tensorboard",
    "wandb": "cmt_fast/storage/loggers/to_wandb",
    "mlflow": "cmt_fast/storage/loggers/to_mlflow",
    "torch_fidelity": "cmt_fast/evaluation/inception",
    "onnx": "cmt_fast/convert/onnx_graph",
    "onnxruntime": "cmt_fast/convert/onnx_graph",
    "onnxscript": "cmt_fast/convert/onnx_graph",
}
TRITON = ("triton", "triton_kernels", "triton_launches", "assembler")  # the modules of cmt_kernels that may name it
STANDALONE = PurePath(
    "cmt_fast/convert/standalone"
)  # the code of an exported folder: diffusers imports it, nothing of ours


def room(path: PurePath) -> str:
    """The room of a file, by its path in the repository. Raises KeyError for a room that is in no table."""
    first, *rest = path.parts
    if first in TOPS:
        name = first
    elif first == "kernels":
        name = "cmt_kernels" if rest[0] == "cmt_kernels" else f"kernels/{rest[0]}"
    elif rest[0] == "__main__.py":
        name = "cli"
    else:
        name = "cmt_fast" if rest[0] == "__init__.py" else rest[0].removesuffix(".py")
    if name not in ARROWS:
        raise KeyError(f"{path} is in no room of the house; the rooms are {', '.join(ARROWS)}")
    return name


def imports(source: str) -> list[tuple[str, bool]]:
    """(module, at import time) for every import in a file; names of `cmt_fast` itself as modules of it."""
    tree = ast.parse(source)
    top = {id(n) for n in tree.body}
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(a.name, id(node) in top) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wide = node.module == "cmt_fast"
            out += [(f"cmt_fast.{a.name}" if wide else node.module, id(node) in top) for a in node.names]
    return out


def imported(module: str) -> str | None:
    """The room that a module is in; None where it is not ours."""
    first, _, rest = module.partition(".")
    if first in (*TOPS, "cmt_kernels"):
        return first
    if first != "cmt_fast":
        return None
    name = rest.partition(".")[0]
    return "cmt_fast" if name == "__version__" or not name else name


def faults(path: PurePath, source: str) -> list[str]:
    """What a file of the package may not import, and what it imports too early."""
    mine, found = room(path), []
    may = ARROWS[mine] if path.parent != STANDALONE else set()
    for module, at_import in imports(source):
        theirs, package = imported(module), module.partition(".")[0]
        if mine not in TOPS:
            allowed = theirs in (None, mine, "cmt_kernels") or theirs in may or ("any" in may and theirs not in TOPS)
            if not allowed or (mine == "cmt_kernels" and package == "cmt_fast"):
                found.append(f"{path}: {mine} may not import {module}")
        if mine == "cmt_kernels" and package == "triton" and path.stem not in TRITON:
            found.append(f"{path}: imports triton; only {', '.join(TRITON)} do")
        if package in DOORS and mine not in TOPS and path.parent != STANDALONE:
            if str(path.with_suffix("")) != DOORS[package]:
                found.append(f"{path}: {module} has one door, {DOORS[package]}.py")
            elif at_import and package != "PIL":
                found.append(f"{path}: {module} is imported when the module is")
    return found


def test_arrows_and_doors():
    assert len(FILES) > 500
    assert [fault for path in FILES for fault in faults(path, (ROOT / path).read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "path, source, said",
    [
        ("cmt_fast/objectives/new.py", "from cmt_fast.train import loop", "objectives may not import cmt_fast.train"),
        ("cmt_fast/diffusion/new.py", "def f():\n    from cmt_fast.data import latents", "diffusion may not import"),
        ("kernels/cmt_kernels/new/triton.py", "import cmt_fast.config", "cmt_kernels may not import"),
        ("cmt_fast/cli/new.py", "from tests.fixtures import tiny", "cli may not import tests"),
        ("cmt_fast/train/new.py", "def f():\n    import deepspeed", "one door, cmt_fast/engine/zero.py"),
        ("cmt_fast/engine/zero.py", "import deepspeed", "is imported when the module is"),
        ("kernels/cmt_kernels/new/native.py", "import triton", "imports triton"),
    ],
)
def test_what_is_planted_is_found(path, source, said):
    assert said in "\n".join(faults(PurePath(path), source))


@pytest.mark.parametrize("path", ["cmt_fast/shed/new.py", "cmt_fast/new.py", "kernels/other/new.py"])
def test_an_unknown_room_fails(path):
    with pytest.raises(KeyError, match="no room"):
        faults(PurePath(path), "")


def test_every_arrow_of_the_table_points_down():
    order = list(ARROWS)
    for mine in order:
        for theirs in ARROWS[mine] - {"any"}:
            assert order.index(theirs) < order.index(mine), (mine, theirs)


def names(source: str) -> list[str]:
    """Every module, or name of one, that a file imports wherever it stands, for the eyes of a type checker alone too."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            out += [f"{node.module}.{a.name}" for a in node.names]
    return out


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a loop, empty if none do; sources: module -> its text."""
    arrows = {}
    for module, source in sources.items():
        found = (name if name in sources else name.rpartition(".")[0] for name in names(source))
        arrows[module] = {name for name in found if name in sources and name != module}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as fault:
        return fault.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle():
    """Nor where an import is put off into a function, which only hides the circle."""
    dotted = lambda path: ".".join(path.with_suffix("").parts).removeprefix("kernels.").removesuffix(".__init__")
    house = {dotted(path): (ROOT / path).read_text("utf-8") for path in FILES if path.parts[0] != "tests"}
    assert len(house) > 150 and circle(house) == []
    planted = {"a.b": "import torch\nfrom a import c", "a.c": "def f():\n    from d import g", "d": "import a.b"}
    assert set(circle(planted)) == {"a.b", "a.c", "d"}
    assert circle(planted | {"d": "if TYPE_CHECKING:\n    import a.b"})


def absent(source: str) -> set[str]:
    """Names in a module's `__all__`, where it is a list of words, that the module neither defines nor imports."""
    tree, offered, there = ast.parse(source), set(), set()
    for node in tree.body:
        match node:
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                there |= {alias.asname or alias.name.partition(".")[0] for alias in aliases}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                there.add(name)
            case ast.Assign(targets=targets) | ast.AnnAssign(target=ast.Name() as targets):
                named = {t.id for t in (targets if isinstance(targets, list) else [targets]) if isinstance(t, ast.Name)}
                there |= named
                if "__all__" in named and isinstance(node.value, ast.List):
                    offered |= {x.value for x in node.value.elts if isinstance(x, ast.Constant)}
    return offered - there


def test_what_a_module_offers_is_there():
    sources = [(ROOT / path).read_text("utf-8") for path in FILES]
    assert sum("__all__" in source for source in sources) > 3
    assert {name for source in sources for name in absent(source)} == set()
    assert absent("import a.b\nfrom c import d as e\nF = 1\n__all__ = ['a', 'e', 'F', 'd', 'G']") == {"d", "G"}


def test_no_file_above_400_lines():
    assert [str(path) for path in FILES if len((ROOT / path).read_text("utf-8").splitlines()) > 400] == []


def undocumented(path: PurePath, source: str) -> list[str]:
    """What of a file has no docstring and needs one: the module, and public functions of more than a statement."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) or not tree.body else [f"{path} has no module docstring"]
    backend = (
        path.name in ("reference.py", "torch.py", "triton.py", "native.py", "cases.py") and path.parts[0] == "kernels"
    )
    if backend or path.parent.name == "cli":  # a backend's docstring is the public function's
        return found
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and len(node.body) == 1
            found += [] if short or ast.get_docstring(node) else [f"{path}: {node.name} has no docstring"]
    return found


def test_public_functions_have_docstrings():
    assert [line for path in OURS for line in undocumented(path, (ROOT / path).read_text("utf-8"))] == []
    planted = "def f():\n    a = 1\n    return a\nclass _B: pass\nclass C: pass"
    assert len(undocumented(PurePath("cmt_fast/train/new.py"), planted)) == 3


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the packages a fresh process has imported after `code`."""
    text = f"import sys\n{code}\nprint([m for m in {names!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=ROOT)
    return ast.literal_eval(out.stdout.splitlines()[-1])


def test_what_reads_pickles_imports_numpy_alone():
    """The sandboxed child starts small, and what it does not have it cannot be made to use."""
    assert loaded("import cmt_fast.safe_pickle.sandbox", ("torch", "pydantic", "yaml")) == []


@pytest.mark.parametrize("command", ["--help", "recipes ls"])
def test_help_and_the_list_of_recipes_import_nothing_heavy(command):
    code = f"import cmt_fast.cli\ntry:\n    cmt_fast.cli.main({command.split()!r})\nexcept SystemExit:\n    pass"
    assert loaded(code, ("torch", "numpy", "pydantic", "yaml", "rich", "cmt_kernels")) == []


def test_the_api_imports_nothing_heavy():
    code = "from cmt_fast import api"
    assert loaded(code, ("torch", "numpy", "pydantic", "yaml", "rich", "cmt_kernels")) == []


def test_importing_the_trainer_is_light():
    heavy = ("diffusers", "sklearn", "matplotlib", "triton", "deepspeed", "nvidia.dali", "torchvision", "tensorboard")
    assert loaded("import cmt_fast.cli.train, cmt_fast.cli.ckpt, cmt_fast.cli.data", heavy) == []


# the modules that import others by a name which they put together: from tables and from the schema's words, never from a file
BY_NAME = {
    "cmt_fast/cli/__init__.py", "cmt_fast/evaluation/inception.py", "cmt_fast/storage/loggers/__init__.py",
    "kernels/cmt_kernels/_op.py", "kernels/cmt_kernels/attention/primal.py", "kernels/cmt_kernels/cases.py",
}  # fmt: skip
RUNS = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "runpy.run_path", "runpy.run_module", "shelve.open", "torch.jit.load", "torch.hub.load",
    "pydoc.locate", "importlib.import_module",
}  # fmt: skip


def runs(source: str) -> list[str]:
    """Calls of a file that would run what another file says, or import what it names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = called == "torch.load" and given.get("weights_only") != "True"
        unsafe |= called == "yaml.load" and [ast.unparse(a) for a in node.args[1:]] != ["Loader"]
        unsafe |= given.get("allow_pickle", "False") != "False"
        found += [called] if called in RUNS or unsafe else []
    return found


def test_no_file_that_is_read_is_run_or_names_what_is_imported():
    found = {str(path): runs((ROOT / path).read_text("utf-8")) for path in OURS}
    assert {path: set(calls) for path, calls in found.items() if calls} == {
        p: {"importlib.import_module"} for p in BY_NAME
    }
    planted = (
        "eval(x)",
        "torch.load(f)",
        "yaml.load(f, yaml.Loader)",
        "np.load(f, allow_pickle=True)",
        "pickle.loads(b)",
    )
    assert all(len(runs(text)) == 1 for text in planted) and not runs("re.compile(x)\ntorch.load(f, weights_only=True)")
