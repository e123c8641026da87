"""Exported folders where nothing of ours is installed: every promise of theirs, each a line that says what was found.

`python clean_export.py OUT [NAME ...]`, of a folder that tests/convert/folders.py wrote; of names that are given everything is
asked, of the others samples alone. It needs torch and diffusers, accelerate or not. Imports of ours raise. Ends with 1 if a
promise is broken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NothingOfOurs:
    """Comes first where modules are looked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("cmt_fast", "cmt_kernels"):
            raise ImportError(f"{name} is not to be had here")


sys.meta_path.insert(0, NothingOfOurs())  # type: ignore[arg-type]
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
N, SEED = 5, 3
broken: list[str] = []


def promise(name: str, what: str, holds: Any, found: Any = "") -> None:
    """A line; what does not hold is kept for the end."""
    print(f"{name:16} {what:58} {'yes' if holds else 'NO'} {found}")
    if not holds:
        broken.append(f"{name}: {what} {found}")


def refused(call: Callable, **arguments: Any) -> str:
    """What a call says that it does not take, in one line."""
    try:
        call(**arguments)
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return ""


def load(folder: Path, **named: Any):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **named)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, steps: int, **named: Any) -> torch.Tensor:
    return pipe(num_inference_steps=steps, output_type="latent", **{"batch_size": N, "seed": SEED, **named}).images


def bits(name: str, pipe: Any, want: dict[str, torch.Tensor], what: str) -> None:
    """Samples of every number of steps are those of the trainer."""
    for key, x in want.items():
        if not key.startswith("images"):
            got = latents(pipe, int(key))
            least = float((got - x).abs().max())
            promise(name, f"{what}, {key} steps: equal bits", torch.equal(got, x), f"largest difference {least:g}")


def arguments(name: str, pipe: Any, steps: int) -> None:
    """Noise, classes and guidance."""
    how, again = pipe.config.sampling, lambda seed: {"seed": None, "generator": torch.Generator().manual_seed(seed)}
    a, b, c = (latents(pipe, steps, **again(k)) for k in (0, 0, 1))
    promise(name, "a generator gives its samples again, another others", torch.equal(a, b) and not torch.equal(a, c))
    each = [torch.Generator().manual_seed(k) for k in range(N)]
    promise(name, "a generator for each sample", latents(pipe, steps, seed=None, generator=each).shape == a.shape)
    noise = torch.randn(a.shape)
    one, two = (latents(pipe, 1 if steps == 1 else steps, latents=noise) for _ in range(2))
    promise(name, "latents of one's own", torch.equal(one, two))
    promise(name, "seed and generator together are refused", "both" in refused(pipe, seed=1, generator=each[0]))
    for wrong, said in (
        ({"generator": each[1:]}, f"{N - 1} of them for {N} images"),
        ({"generator": [*each, each[0]]}, f"{N + 1} of them for {N} images"),
        ({"generator": 0}, "is no torch.Generator"),
        ({"seed": [1] * N}, "from 0 to 4294967295"),
        ({"seed": 2**32}, "from 0 to 4294967295"),
        ({"seed": -1}, "from 0 to 4294967295"),
        ({"num_inference_steps": 0}, "from 1 on"),
        ({"num_inference_steps": True}, "from 1 on"),
        ({"batch_size": 0}, "from 1 on"),
        ({"guidance_scale": [1.0]}, "is no number"),
        ({"latents": noise.numpy()}, "is no tensor of floats"),
        ({"latents": noise[:0]}, "has the shape (0, "),
        ({"latents": noise[1:]}, f"{N - 1} of them for batch_size {N}"),
        ({"latents": noise * math.nan, "num_inference_steps": steps}, "are not finite"),
    ):
        found = refused(pipe, **{"batch_size": N, "output_type": "latent", **wrong})
        promise(name, f"{next(iter(wrong))} that is none is refused", said in found, found)
    numpys = latents(pipe, np.int64(steps), batch_size=np.int64(N), seed=np.int64(SEED), guidance_scale=np.float32(1))
    promise(name, "numpy's numbers are numbers", torch.equal(numpys, latents(pipe, steps, guidance_scale=1)))
    if how["classes"]:
        names = list(pipe.labels)
        x, y = (latents(pipe, steps, class_labels=k) for k in (1, names[1]))
        z = latents(pipe, steps, class_labels=np.full(N, 1))
        promise(name, "a class by number, by name, as an array", torch.equal(x, y) and torch.equal(x, z), names[1])
        promise(name, "a class that is none is refused", "did you mean" in refused(pipe, class_labels="none such"))
        promise(name, "a number that is none is refused", "not among" in refused(pipe, class_labels=how["classes"]))
        promise(name, "a class that is no number is refused", "not among" in refused(pipe, class_labels=[1.0]))
    else:
        promise(name, "classes are refused", "takes no labels" in refused(pipe, class_labels=0))
    if how["no_guidance"]:
        found = refused(pipe, guidance_scale=2.0, output_type="latent")
        promise(name, "guidance is refused", how["no_guidance"] in found, found)
    else:
        plain, strong = (latents(pipe, steps, guidance_scale=w) for w in (1.0, 2.0))
        promise(name, "guidance changes the samples", not torch.equal(plain, strong))


def scales(name: str, pipe: Any) -> None:
    """What the network is told: a scale for all, or one for each image."""
    most = pipe.config.sampling["told"]["most"]
    each = [1.0, 2.0, most, 2.0, 1.0]
    mixed, alone = latents(pipe, 1, guidance_scale=each), {w: latents(pipe, 1, guidance_scale=w) for w in set(each)}
    apart = max(float((mixed[i] - alone[w][i]).abs().max()) for i, w in enumerate(each))
    promise(name, "a scale for each image is that scale for all", apart < 1e-5, f"{apart:g}")
    promise(name, "scales differ", float((alone[1.0] - alone[most]).abs().max()) > 1e-2)
    for wrong in (most + 1, 0.5, [1.0, 2.0], True, math.nan):
        found = refused(pipe, batch_size=N, guidance_scale=wrong, output_type="latent")
        promise(name, f"the scale {wrong} is refused", f"a number from 1 to {most:g}" in found, found)


def outputs(name: str, pipe: Any, steps: int, want: dict[str, torch.Tensor]) -> None:
    """Pictures, arrays and tensors are the same images."""
    shape, known = pipe.config.sampling["shape"], {"batch_size": N, "seed": SEED, "num_inference_steps": steps}
    if pipe.config.decoding is None and (len(shape) != 3 or shape[0] not in (1, 3)):
        promise(name, "pictures of what are none are refused", "are no images" in refused(pipe))
        return
    pt, array, pictures = (pipe(**known, output_type=k).images for k in ("pt", "np", "pil"))
    promise(name, "pt and np are the same numbers", np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array), pt.shape)
    same = all(np.array_equal(np.asarray(p).reshape(a.shape), (a * 255).round()) for p, a in zip(pictures, array))
    promise(name, "pil has their bytes", same, (pictures[0].size, pictures[0].mode))
    if f"images-{steps}" in want:
        promise(name, "decoded as by the trainer: equal bits", torch.equal(pt, want[f"images-{steps}"]))
        bare = Path(tempfile.mkdtemp()) / "bare"  # as it is exported without --vae
        shutil.copytree(pipe.config._name_or_path, bare, ignore=shutil.ignore_patterns("vae"))
        index = json.loads((bare / "model_index.json").read_text())
        (bare / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
        alone, given = load(bare), load(bare, vae=pipe.vae)
        promise(name, "without its autoencoder pictures are refused", "vae: is missing" in refused(alone))
        promise(name, "without its autoencoder: equal bits", torch.equal(latents(alone, steps), latents(pipe, steps)))
        promise(name, "with one that is given: equal bits", torch.equal(given(**known, output_type="pt").images, pt))


def dtypes(name: str, folder: Path, steps: int, exact: torch.Tensor) -> None:
    """Loaded in a narrower dtype the network computes in it, and samples stay float32; fp16 rounds finer than bf16."""
    errors = {}
    for dtype in (torch.bfloat16, torch.float16):
        pipe = load(folder, torch_dtype=dtype)
        got = latents(pipe, steps)
        errors[dtype] = float((got - exact).norm() / exact.norm())
        right = pipe.network.dtype == dtype and got.dtype == torch.float32 and bool(got.isfinite().all())
        later = load(folder)
        later.to(dtype)
        promise(name, f"{dtype}, finite, float32 given", right, f"relative error {errors[dtype]:.2g}")
        promise(name, f"{dtype} by .to() is that of loading: equal bits", torch.equal(latents(later, steps), got))
    promise(name, "float16 errs less than bfloat16", 0 < errors[torch.float16] < errors[torch.bfloat16])


def devices(name: str, folder: Path) -> None:
    """On the meta device any tensor that were made elsewhere is an error; so is one in a forward under autocast's dtype."""
    pipe = load(folder)
    how, net = pipe.config.sampling, pipe.network.to("meta")
    x, t = torch.empty(2, *how["shape"], device="meta"), torch.empty(2, device="meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta") if how["classes"] else None
    y = net(x, t, t, labels)
    places = {str(p.device) for p in (*net.parameters(), *net.buffers(), y)}
    promise(name, "moved whole, and nothing made elsewhere", places == {"meta"} and y.shape == x.shape, places)
    with torch.autocast("cpu", torch.bfloat16):
        got = latents(load(folder), how["steps"])
    promise(name, "under autocast: finite float32", got.dtype == torch.float32 and bool(got.isfinite().all()))


def saved_again(name: str, pipe: Any, want: dict[str, torch.Tensor]) -> None:
    """save_pretrained keeps weights, code, settings and card, and nothing that is pickled."""
    to = Path(tempfile.mkdtemp()) / "again"
    pipe.save_pretrained(to)
    files = sorted(p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file())
    code = [f for f in files if f.endswith(".py")]
    promise(name, "saved again: code and card", len(code) == 2 and {"pipeline.py", "README.md"} <= set(files), code)
    promise(
        name,
        "saved again: safetensors only",
        {Path(f).suffix for f in files} <= {".json", ".py", ".md", ".png", ".safetensors"},
    )
    bits(name, load(to), want, "saved again")
    kept = json.loads((to / "network/config.json").read_text())
    promise(name, "saved again: no folder of this machine", "_name_or_path" not in kept, [*kept][:3])
    bits(name, type(pipe).from_pipe(pipe), want, "from_pipe")
    promise(name, "its modules alone are refused", "from_pipe" in refused(type(pipe), **pipe.components))
    narrow = to.with_name("narrow")
    half = load(to, torch_dtype=torch.float16)
    half.save_pretrained(narrow)
    steps = int(next(iter(want)))
    back = latents(load(narrow, torch_dtype=torch.float16), steps)
    promise(name, "saved and loaded in float16: equal bits", torch.equal(back, latents(half, steps)))


def published(name: str, folder: Path) -> None:
    """What `push_to_hub` would upload, also of a pipeline loaded by a relative path that leads nowhere now: the same card."""
    uploaded, real, where = [], {}, os.getcwd()
    stand_ins = {
        "create_repo": lambda *_, **__: argparse.Namespace(repo_id="some/body"),
        "upload_folder": lambda folder_path, **_: uploaded.append((Path(folder_path) / "README.md").read_text("utf-8")),
    }
    modules = (diffusers.utils.hub_utils, diffusers.pipelines.pipeline_utils)
    for module, key in ((m, k) for m in modules for k in stand_ins if hasattr(m, k)):
        real[module, key] = getattr(module, key)
        setattr(module, key, stand_ins[key])
    try:
        os.chdir(folder.parent)
        pipe = load(folder.name)  # type: ignore[arg-type]
        os.chdir(tempfile.mkdtemp())
        pipe.push_to_hub("some/body")
        pipe.save_pretrained("saved", push_to_hub=True)
    finally:
        os.chdir(where)
        for (module, key), call in real.items():
            setattr(module, key, call)
    promise(name, "the hub gets the card", uploaded == [(folder / "README.md").read_text("utf-8")] * 2, len(uploaded))


def as_typed(name: str, folder: Path) -> None:
    """The lines of the card run in the folder as they stand."""
    card = (folder / "README.md").read_text("utf-8")
    block = card.partition("```python\n")[2].partition("```")[0]
    code = "\n".join(line for line in block.splitlines() if "save(" not in line and "print(" not in line)
    where = os.getcwd()
    try:
        os.chdir(folder)
        exec(compile(code, "README.md", "exec"), {})
        promise(name, "the card's lines run as typed", bool(code))
    finally:
        os.chdir(where)


def another_project(folder: Path) -> None:
    """Load a pipeline.py of others, which diffusers runs under the same module's name, with our names for other things."""
    other = Path(tempfile.mkdtemp()) / "other"
    shutil.copytree(folder, other)
    text = (other / "pipeline.py").read_text("utf-8")
    names = ("Prediction", "integrate", "seeded_normal", "solver_rows", "math", "randn_tensor")
    (other / "pipeline.py").write_text("\n".join([text, *(f"{name} = None" for name in names)]), "utf-8")
    load(other)


def main(out: Path, chosen: list[str]) -> None:
    """All promises of the chosen folders, or of all; of the others that samples are equal."""
    for module in ("cmt_fast", "cmt_kernels"):
        try:
            importlib.import_module(module)
            promise("imports", f"{module} is not to be had", False)
        except ImportError:
            pass
    accelerate = importlib.util.find_spec("accelerate") is not None
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, accelerate {'' if accelerate else 'not '}there"
    )
    pipes = {}
    for file in sorted(out.glob("*/expected.safetensors")):
        name, folder, want = file.parent.name, file.parent / "pipe", load_file(file)
        with safe_open(file, "pt") as opened:
            torch.set_num_threads(int(opened.metadata()["threads"]))
        pipe = load(folder)
        pipes[name] = (pipe, want)
        bits(name, pipe, want, "loaded")
        if "told" in pipe.config.sampling:
            scales(name, pipe)
        if chosen and name not in chosen:
            continue
        steps = int(next(iter(want)))
        arguments(name, pipe, steps)
        outputs(name, pipe, steps, want)
        dtypes(name, folder, steps, latents(pipe, steps))
        devices(name, folder)
        saved_again(name, pipe, want)
        published(name, folder)
        as_typed(name, folder)
    another_project(out / name / "pipe")
    for name, (pipe, want) in pipes.items():
        bits(name, pipe, want, "after all others were loaded")
    print(f"{len(pipes)} folders, {len(broken)} promises broken")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    print("\n".join(broken), file=sys.stderr)
    sys.exit(bool(broken))
