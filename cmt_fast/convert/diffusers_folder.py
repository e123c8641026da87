"""A stage's network as a folder that diffusers loads where nothing of ours is installed.

The folder holds its own code: convert/standalone/pipeline.py, noise.py within it, and the one file of its network. Beside them
lie the weights in fp32, how samples are drawn, the autoencoder where one is given, a picture and the model card.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmt_fast import models
from cmt_fast.config import paths
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION
from cmt_fast.convert import architecture, card
from cmt_fast.convert.architecture import Architecture
from cmt_fast.convert.exporting import Export, claim
from cmt_fast.data import classes as classes_
from cmt_fast.render import grids
from cmt_fast.run import guidance
from cmt_fast.runtime import words
from cmt_fast.storage import files as files_

CODE = Path(__file__).parent / "standalone"
GRID = "samples.png"
WIDE, MANY, FEW = (
    10,
    40,
    8,
)  # samples in a row of the picture, of a network of at most LARGE parameters, of a larger one
LARGE = 30_000_000


def write(export: Export, out: Path, vae: Path | None = None, terms: card.Terms | None = None) -> None:
    """Write a pipeline's folder: model_index.json, pipeline.py, network/, vae/ where one is given, the card and its picture.

    vae: an autoencoder's folder, copied. Without one nothing of diffusers is needed. Raises ConfigError.
    """
    claim(out)
    work, terms = export.work, terms or card.Terms()
    terms.check()
    if vae is not None and not (vae / "config.json").is_file():
        raise ConfigError(f"--vae: {str(vae)!r} holds no config.json, it is no autoencoder's folder")
    if vae is not None and work.decoding.latents is None:
        raise ConfigError("--vae: the run's data are no latents, nothing is decoded")
    if vae is not None:
        work.decoding.codec(str(vae))  # refuses one that did not make the latents
    made = architecture.of(work.run, tuple(work.data.shape), work.data.classes)
    net, what = _network(export), described(export, vae is not None)
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        folder = temporary / "network"
        folder.mkdir(parents=True)
        _code(temporary, made)
        _json(temporary / "model_index.json", _index(export, made, what, vae))
        _json(folder / "config.json", {"_class_name": made.name, **made.arguments})
        file = folder / "diffusion_pytorch_model.safetensors"
        about = {**export.about, "run": paths.unplaced(export.about["run"])}
        files_.save_tensors(
            file, _tensors(net), {"format": "pt", "cmt-fast-pipeline": json.dumps(about, sort_keys=True)}
        )
        files_.sync(file)
        if vae is not None:
            _copy(vae, temporary / "vae")
        what = what._replace(picture=_picture(export, net, what.sampling, vae, temporary / GRID))
        text = card.markdown(work, export.stage, export.about, terms, what)
        files_.write_text(temporary / "README.md", text)
        os.replace(temporary, out)
        files_.sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _network(export: Export) -> nn.Module:
    """The trainer's own network with these weights, each that is normalised in a forward normalised once and for all."""
    work = export.work
    net = work.build()
    net.load_state_dict({k: t.to(torch.float32) for k, t in export.weights.items()})
    return models.fold(net.to(work.device).requires_grad_(False).eval())


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """What sampling reads, by the names of the standalone code: those of ours without the wrapper's.

    EDM2's log variance weighs a loss, and EDM's labels of an augmentation are 0 in samples. NCSN++'s random frequencies are
    kept in fp32 by a module of their own. An auxiliary head's velocity is read in training alone.
    """
    unread = ("log_variance.", "augment.", "velocity_", "head_modulations.", "head_fc", "head_final.")
    own = {"frequency": "noise.frequency"}
    named = {own.get(name, name): t for k, t in net.state_dict().items() if (name := k.removeprefix("net."))}
    return {k: t.detach().cpu().contiguous().clone() for k, t in named.items() if not k.startswith(unread)}


def _sampling(export: Export) -> dict[str, Any]:
    """How samples are drawn, as JSON types: what `Sampler` reads of the recipe, and what guidance means."""
    run, data, law = export.work.run, export.work.data, export.work.setting.law
    many, c = run.stages[export.stage].objective.kind in DIFFUSION, run.sampler
    reads = bool(data.classes) and getattr(run.model, "conditional", True)
    told = None if many else _told(export)
    why = None if told else _no_guidance(export, many, reads)
    return {
        "path": run.path,
        "sigma_data": run.sigma_data,
        "precondition": getattr(run.model, "precondition", "edm"),
        "shape": list(data.shape),
        "classes": data.classes if reads else 0,
        "counts": law.counts.tolist() if reads else [],
        "many_steps": many,
        "steps": c.teacher_steps if many else run.eval.steps[0],
        "solver": c.solver,
        "order": c.order,
        "t_max": c.t_max,
        "t_min": c.t_min,
        **({"shift": c.shift} if c.shift != 1 else {}),
        "mid_times": {str(k): list(times) for k, times in c.mid_times.items()} if run.path == "ve" and not many else {},
        "guidance": 1.0 if why else c.told_guidance[0] if told else c.guidance,
        "no_guidance": why,
        **({"told": told} if told else {}),
    }


def _told(export: Export) -> dict[str, Any] | None:
    """Of a network of few steps that is told its guidance: the interval of the recipe, and the largest scale of its training."""
    most = guidance.told_most(export.work.place, export.stage)
    return {"interval": list(export.work.run.sampler.told_guidance[1:]), "most": most} if most > 1 else None


def _no_guidance(export: Export, many: bool, reads: bool) -> str | None:
    """Why classifier-free guidance means nothing for this network; None where it does."""
    if not reads:
        return "for the network reads no labels"
    if not many:
        return "for a network of few steps is guided in training or not at all"
    null = guidance.null_class(export.work.place, export.stage)
    if null is None or null.trained:
        return None if null else "for nobody says whether its null class is trained"
    trained = "is not known to be trained" if null.trained is None else "is not trained"
    return f"for its null class {trained}: {null.why}"


def described(export: Export, vae: bool = False) -> card.Pipeline:
    """What a folder of this export holds; vae: its autoencoder too."""
    return card.Pipeline(_sampling(export), _decoding(export), vae)


def _index(export: Export, made: Architecture, what: card.Pipeline, vae: Path | None) -> dict[str, Any]:
    """model_index.json."""
    names = classes_.names(export.work.data) if what.sampling["classes"] else []
    return {
        "_class_name": ["pipeline", "CmtPipeline"],
        "network": [made.file, made.name],
        "vae": ["diffusers", _class(vae)] if vae else [None, None],
        "sampling": what.sampling,
        "decoding": what.decoding,
        "id2label": {str(k): name for k, name in enumerate(names)},
    }


def _class(vae: Path) -> str:
    """Of diffusers, that an autoencoder's folder says it is."""
    return json.loads((vae / "config.json").read_text("utf-8")).get("_class_name") or "AutoencoderKL"


def _decoding(export: Export) -> dict[str, Any] | None:
    """How the data's latents are scaled, and the name of their autoencoder; None for pixels and vectors."""
    index = export.work.decoding.latents
    if index is None:
        return None
    constants, numbers = export.work.data.normalisation, lambda values: [float(v) for v in values]
    vae = {"vae": index.vae, "vae_xxh3_128": index.vae_xxh3_128}
    return {"mean": numbers(constants.mean), "std": numbers(constants.std), "scale": float(constants.scale), **vae}


def _picture(export: Export, net: nn.Module, sampling: dict[str, Any], vae: Path | None, to: Path) -> str | None:
    """Samples of these weights, one of each class after the other, as a PNG; what it shows. None for what is no picture."""
    work, many = export.work, sampling["many_steps"]
    if len(work.data.shape) != 3:
        return None
    n = MANY if work.parameters <= LARGE else FEW
    # counts of steps that this pipeline serves: the default, beside it two steps of a network of few
    two = work.run.path == "linear" or "2" in sampling["mid_times"]
    counts = [sampling["steps"]] if many else [1, 2][: 1 + two]
    codec, rows, note = work.decoding.codec(str(vae)) if vae is not None else None, [], ""
    for steps in counts:
        x = work.setting.each_class().generate(net, steps, n // len(counts), 0, many, work.run.eval.batch)
        x, note = (codec.decode(x), "") if codec else work.decoding.visible(x)
        rows += [(words.steps(steps) if i == 0 else "", part) for i, part in enumerate(x.split(WIDE))]
    grids.grid(rows, to)
    said = " and ".join(f"{k}" for k in counts)
    return f"Samples of these weights in {said} step{'s' * (counts != [1])}, seed 0, one of each class in turn" + (
        f" ({note} channels)" if note else ""
    )


def _code(folder: Path, made: Architecture) -> None:
    """pipeline.py, with the functions of noise.py in the place of the line that imports them, and the network's file."""
    whole, noise = ((CODE / f"{name}.py").read_text("utf-8") for name in ("pipeline", "noise"))
    before, _, after = whole.partition("from cmt_fast.convert.standalone.noise import ")
    functions = noise[noise.index("START, AGAIN = ") :]  # what is before them is imported already
    files_.write_text(folder / "pipeline.py", before + functions + after.partition("\n")[2])
    shutil.copyfile(CODE / f"{made.file}.py", folder / "network" / f"{made.file}.py")


def _copy(vae: Path, to: Path) -> None:
    """An autoencoder's settings and safetensors; no other file of its folder."""
    to.mkdir()
    files = [vae / "config.json", *sorted(vae.glob("*.safetensors")), *sorted(vae.glob("*.safetensors.index.json"))]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ConfigError(f"--vae: {str(vae)!r} holds no .safetensors")
    for file in files:
        shutil.copyfile(file, to / file.name)


def _json(path: Path, tree: dict[str, Any]) -> None:
    files_.write_text(path, json.dumps(tree, indent=2) + "\n")
