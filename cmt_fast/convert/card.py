"""The model card of an exported pipeline: what it is, where it comes from, how it was judged, how it is loaded.

Front matter is YAML as the hub reads it; below it every word of a user (names, paths, an imported file's arguments) is escaped.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cmt_fast.config import loading, paths
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import STAGES
from cmt_fast.data import rights
from cmt_fast.render import templates
from cmt_fast.render.templates import Group, Section, Table
from cmt_fast.run.workspace import Workspace
from cmt_fast.safe_pickle.opcodes import shown
from cmt_fast.storage import checkpoint, sound
from cmt_fast.storage.metrics_log import METRICS
from cmt_fast.storage.record import Record
from cmt_fast.usage import bills

HOW = """import torch
from diffusers import DiffusionPipeline

# this folder, or its name on the hub; nothing but torch and diffusers is needed
pipe = DiffusionPipeline.from_pretrained(".", torch_dtype=torch.float32, trust_remote_code=True)
{device}images = pipe({arguments}).images
{end}
"""
ON_GPU = 'if torch.cuda.is_available():\n    pipe.to("cuda")\n'
NOT_STATED = "not stated"
OPTIONS = ("--license", "--data-license", "--teacher-license")  # of `cmt ckpt export`, in the order of Terms


# The hub's words for licences (huggingface.co/docs/hub/repositories-licenses); it refuses a card with another.
HUB = """\
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1
ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 grok2-community gemma unknown other"""


class Terms(NamedTuple):
    """Licences, as the hub names them (apache-2.0): of these weights, of the data, of the teacher. None: nothing was said."""

    weights: str | None = None
    data: str | None = None
    teacher: str | None = None

    def check(self) -> None:
        """Raises ConfigError for what is no identifier, naming the option."""
        for option, value in zip(OPTIONS, self):
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", value):
                raise ConfigError(f"{option}: {shown(value)!r} is no licence's identifier, such as apache-2.0")

    @property
    def front(self) -> dict[str, str]:
        """The licence of the weights as the hub reads it: one that it has no word for is "other" and its name."""
        if self.weights is None:
            return {"license": "unknown"}
        word = self.weights.lower()
        return {"license": word} if word in HUB.split() else {"license": "other", "license_name": word}


class Pipeline(NamedTuple):
    """What the folder holds: how samples are drawn and latents decoded, whether an autoencoder; what its picture shows."""

    sampling: dict[str, Any]
    decoding: dict[str, Any] | None
    vae: bool
    picture: str | None = None


def markdown(work: Workspace, stage: str, about: dict[str, Any], terms: Terms, pipeline: Pipeline) -> str:
    """README.md of the folder."""
    run, sampling, decoding = work.run, pipeline.sampling, pipeline.decoding
    shape = " x ".join(map(str, work.data.shape))
    spent = _spent(work, about)
    front = {
        **terms.front,
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["consistency-mid-training", "cmt-fast", "few-step-generation"],
        "cmt_fast": {"version": about["version"], "digest": about["digest"], **spent},
    }
    kind = "A diffusion model" if sampling["many_steps"] else "A generator of few steps"
    text = [
        f"{kind} for {run.data.kind} ({shape}, {work.data.classes or 'no'} classes), stage {stage} of the recipe {run.name}: "
        f"{run.model.kind}, {work.parameters:,} parameters, path {run.path}, trained with cmt-fast {about['version']}.",
        _spent_text(spent),
    ]
    if decoding is not None:
        text.append(
            f"It makes latents of the autoencoder {decoding['vae']}: z = {decoding['scale']:g} (x - mean) / std, "
            f"mean {decoding['mean']}, std {decoding['std']}."
        )
    sections = [
        Section("", text, []),
        Section("Use", ["In the folder of this file:"], []),
        Section("Figures", _judge(work, stage, about), [Group(_figures(work, stage, about), wide=True)]),
        Section("Sampling", _sampling_text(sampling), [Group([_sampling(sampling)], wide=True)]),
        Section("Limits", _limits(work, pipeline), []),
        Section("Licences", _licences(work, about, terms), []),
        Section("Lineage", [], [Group([_lineage(about)], wide=True)]),
        Section(
            "Recipe", [], [], "The resolved run", yaml.safe_dump(paths.unplaced(loading.dump(run)), sort_keys=False)
        ),
    ]
    page = templates.markdown(run.name, sections)
    page = page.replace(
        "\nIn the folder of this file:\n", f"\nIn the folder of this file:\n\n```python\n{_usage(pipeline)}```\n", 1
    )
    if pipeline.picture:
        page = page.replace("\n## Use\n", f"\n![{pipeline.picture}](samples.png)\n\n{pipeline.picture}.\n\n## Use\n", 1)
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{page}"


def _usage(pipeline: Pipeline) -> str:
    """Lines that run as they are typed."""
    sampling = pipeline.sampling
    images = pipeline.vae or (
        pipeline.decoding is None and len(sampling["shape"]) == 3 and sampling["shape"][0] in (1, 3)
    )
    who = f"class_labels=[0, {min(1, sampling['classes'] - 1)}]" if sampling["classes"] else "batch_size=2"
    arguments = f"{who}, num_inference_steps={sampling['steps']}, seed=0"
    if not images:
        return HOW.format(device=ON_GPU, arguments=f'{arguments}, output_type="latent"', end="print(images.shape)")
    return HOW.format(device=ON_GPU, arguments=arguments, end='images[0].save("image.png")')


def _sampling_text(sampling: dict[str, Any]) -> list[str]:
    guidance = f"guidance_scale means nothing here, {sampling['no_guidance']}."
    if told := sampling.get("told"):
        low, high = told["interval"]
        guidance = (
            f"guidance_scale: what the network is told, a number from 1 to {told['most']:g} or one for each image, "
        )
        guidance += (
            f"by default {sampling['guidance']:g}; it holds at times in [{low:g}, {high:g}] and costs no second call."
        )
    elif not sampling["no_guidance"]:
        guidance = f"guidance_scale: classifier-free guidance, by default {sampling['guidance']:g}; 1 is none."
    return ["num_inference_steps counts network calls. " + guidance]


def _sampling(sampling: dict[str, Any]) -> Table:
    """Which numbers of steps there are, and the times at which each calls the network."""
    high, low, ve = sampling["t_max"], sampling["t_min"], sampling["path"] == "ve"
    if sampling["many_steps"]:
        grid = "each a constant factor below the last" if ve else "evenly spaced"
        even = ", an even number" if sampling["solver"] == "heun" else ""
        solver = f"{sampling['solver']}" + (f" of order {sampling['order']}" if sampling["solver"] == "dpmpp" else "")
        rows = [[f"any{even}; by default {sampling['steps']}", f"{solver}, from {high:g} to {low:g}, {grid}"]]
    elif ve:
        known = {1: [], **{int(k): times for k, times in sampling["mid_times"].items()}}
        rows = [[str(k), ", ".join(f"{t:g}" for t in [high, *known[k]])] for k in sorted(known)]
    else:
        rows = [["any", "jumps on the even grid from 1 to 0"], ["1", "1 -> 0"], ["2", "1 -> 0.5 -> 0"]]
    return Table("", ["steps", "times"], rows, left=2)


def _limits(work: Workspace, pipeline: Pipeline) -> list[str]:
    n = f"{work.data.n:,} rows of " if work.data.n else ""
    lines = [
        f"It was trained on {n}{work.run.data.kind} and draws what is like them; what they lack or overdo, it lacks and overdoes."
    ]
    if not pipeline.sampling["many_steps"] and pipeline.sampling["path"] == "ve":
        lines.append("Only the numbers of steps in the table have times.")
    if pipeline.decoding is not None and not pipeline.vae:
        lines.append(
            "The autoencoder is not in this folder: give from_pretrained(..., vae=AutoencoderKL), or take output_type='latent'."
        )
    lines.append(
        "With seed, in float32 on a CPU, images are those of cmt sample in plain torch with as many threads, bit for bit; other "
        "devices and dtypes round otherwise."
    )
    return lines


def _spent(work: Workspace, about: dict[str, Any]) -> dict[str, Any]:
    """GPU-hours, core-hours and kWh of the stages behind these weights that were trained by us, and their names.

    Null where one of them was not billed from its start; what an imported file cost nobody knows, and is not in it.
    """
    found, names, node = [], [], about["lineage"]
    while node and not node.get("file"):
        if node["nimg"]:
            names.insert(0, node["stage"])
            found.append(_bill(work, node))
        node = node.get("parent")
    whole = [b for b in found if b and not b.from_nimg]
    if not whole or len(whole) < len(found):
        return {"gpu_hours": None, "core_hours": None, "kwh": None, "stages": names}
    gpu, core = (bills.total(whole, unit) for unit in ("gpu", "core"))
    kwh = None if core.seconds else gpu.kwh
    return {"gpu_hours": gpu.hours, "core_hours": core.hours, "kwh": kwh, "stages": names}


def _bill(work: Workspace, node: dict[str, Any]) -> bills.Usage | None:
    """The bill of a stage in the lineage, if the stage found here still is the one that is meant."""
    if node["stage"] not in STAGES:
        return None
    folder = work.stage_dir(node["stage"])
    with contextlib.suppress(checkpoint.CheckpointError):
        found = checkpoint.newest(folder)
        if found and node["ema"] in [file["xxh3_128"] for file in found.manifest["files"].values()]:
            return bills.of_stage(folder, found.manifest)
    return None


def _spent_text(spent: dict[str, Any]) -> str:
    """The same as a sentence."""
    if spent["gpu_hours"] is None:
        return "What training took was not recorded."
    kinds = (("gpu_hours", "GPU-hours"), ("core_hours", "core-hours"))
    parts = [f"{spent[key]:.4g} {kind}" for key, kind in kinds if spent[key]]
    energy = "energy not measured" if spent["kwh"] is None else f"{spent['kwh']:.4g} kWh"
    stages = ", ".join(spent["stages"])
    return f"{' and '.join(parts)}, {energy}: stages {stages}, with their evaluations and what kills took."


def _stored(work: Workspace, stage: str, ema: str) -> dict[str, Any] | None:
    """What `cmt report` wrote of the weights with this checksum."""
    for folder in (work.folder, work.parents):
        try:
            found = sound.read(folder / stage / "figures.json")
            if found["key"]["ema"] == ema and found["key"]["eval"]["n"]:
                return found
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _others(work: Workspace, stage: str) -> dict[str, str]:
    """The stages of this run that the figures are set beside, and what each is."""
    stages = work.run.stages
    teacher = stages[stage].teacher or ("pre" if "pre" in stages else None)
    out = {teacher: f"teacher ({teacher})"} if teacher in stages and teacher != stage else {}
    if "control" in stages and stage != "control":
        out["control"] = "control"
    if stage == "control" and "post" in stages:
        out["post"] = "post, with mid-training"
    return out


def _judge(work: Workspace, stage: str, about: dict[str, Any]) -> list[str]:
    found, lines = _stored(work, stage, about["lineage"]["ema"]), []
    if found is not None:
        settings = found["key"]
        n, seed = settings["eval"]["n"], settings["eval"]["seed"]
        lines.append(f"{n:,} samples of these weights, seed {seed}; features {settings.get('extractor')}.")
    elif _evaluated(work, stage):
        lines.append(f"The last evaluation during training, {work.run.eval.n_during:,} samples.")
    else:
        return ["Not evaluated."]
    if _compared(work, stage, about):
        lines.append("All rows have the same judge, the same number of samples and the same seed.")
    if "control" in _compared(work, stage, about):
        lines.append("control is post-training without mid-training, straight from pre, for as many student images.")
    lines.append("Lower distances (Fréchet, sliced Wasserstein) are better.")
    if found is not None and settings.get("second"):
        lines.append(f"The second feature space: {settings['second']}.")
    floor, sharpness = _real(work, found)
    if floor:
        lines.append("The floor: as many real rows, drawn again, as a network that knows them by heart would.")
    if sharpness is not None:
        lines.append(f"Sharpness, the share of energy in high frequencies, is {sharpness:.4g} of real rows.")
    return lines


def _real(work: Workspace, found: dict[str, Any] | None) -> tuple[dict[str, Any] | None, float | None]:
    """The floor and sharpness of real rows that the run keeps, under the judge of a figures.json."""
    key = found["key"] if found else {}
    return work.judging.of_real(key.get("extractor"), key["eval"]["n"]) if found else (None, None)


def _evaluated(work: Workspace, stage: str) -> dict[str, Any] | None:
    return next(reversed(Record.newest(Path(work.stage_dir(stage)) / METRICS).kind("eval")), None)


def _entries(found: dict[str, Any] | None, last: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """(steps, figures) of a figures.json, or of an evaluation in training."""
    if found is None:
        return [(str(k), v) for k, v in ((last or {}).get("steps") or {}).items() if v]
    kinds = (("few", "few-step"), ("solver", "ODE solver"))
    return [(f"{k}, {how}", v) for key, how in kinds for k, v in (found.get(key) or {}).items() if v]


def _compared(work: Workspace, stage: str, about: dict[str, Any]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Entries of the other stages that were judged as this one was."""
    own, out = _stored(work, stage, about["lineage"]["ema"]), {}
    same = lambda found: {k: v for k, v in found["key"].items() if k != "ema"}
    for other in _others(work, stage):
        found = None
        with contextlib.suppress(checkpoint.CheckpointError):
            latest = checkpoint.newest(work.stage_dir(other))
            if own and latest:
                found = _stored(work, other, latest.manifest["files"]["ema-0.safetensors"]["xxh3_128"])
        if own is None and _evaluated(work, stage):
            out[other] = _entries(None, _evaluated(work, other))
        elif own and found and same(own) == same(found):
            out[other] = _entries(found, None)
    return {name: entries for name, entries in out.items() if entries}


def _figures(work: Workspace, stage: str, about: dict[str, Any]) -> list[Table]:
    """Rows by network and steps: from figures.json of the same weights, or the last evaluation in training."""
    found = _stored(work, stage, about["lineage"]["ema"])
    own, (floor, _) = _entries(found, _evaluated(work, stage)), _real(work, found)
    names, compared = _others(work, stage), _compared(work, stage, about)
    entries = [(f"this ({stage})", *entry) for entry in own]
    entries += [(names[other], *entry) for other in compared for entry in compared[other]] if own else []
    if floor and own:
        entries.insert(0, ("real rows, again (floor)", "", floor))
    columns = sorted({c for *_, figures in entries if figures is not floor for c in figures}, key=_place)
    cells = lambda figures: (f"{figures[c]:.4g}" if isinstance(figures.get(c), (int, float)) else "-" for c in columns)
    rows = [[name, steps, *cells(figures)] for name, steps, figures in entries]
    return [Table("", ["network", "steps", *map(_title, columns)], rows, left=2)] if rows else []


def _place(column: str) -> tuple[int, str]:
    """Distances come first, accuracy last: by itself it says little."""
    return (0 if column.startswith("frechet") else 2 if column == "accuracy" else 1), column


def _title(column: str) -> str:
    """`frechet_2` in words."""
    words = column.removesuffix("_2").replace("frechet", "Fréchet").replace("_w", " W")
    return words + ", second space" * column.endswith("_2")


def _lineage(about: dict[str, Any]) -> Table:
    rows, node = [], about["lineage"]
    while node:
        file = f"{node['file']}, {node['family']}, entry {node['entry'] or 'only one'}" if node.get("file") else ""
        rows.append([node["stage"], f"{node['nimg']:,}", (node["config"] or "-")[:12], node["ema"][:16], file])
        node = node.get("parent")
    return Table("Newest first", ["stage", "images", "config digest", "EMA or file checksum", "file"], rows, left=5)


def foreign(work: Workspace, about: dict[str, Any]) -> list[str]:
    """The weights of others behind these: an imported file, and stages of other runs that taught."""
    node, stages = about["lineage"], []
    while node and not node.get("file"):
        stages.append(node["stage"])
        node = node.get("parent")
    taught = [work.run.stages[name].networks().values() for name in stages if name in work.run.stages]
    runs = dict.fromkeys(name for names in taught for name in names if "/" in name)
    return [*([f"{node['file']} (sha256 {node['sha256']})"] if node else []), *runs]


def unsaid(work: Workspace, about: dict[str, Any], terms: Terms) -> list[str]:
    """The options that would say what the card does not know."""
    data = terms.data or rights.known(work.run.data.kind)
    asked = zip(OPTIONS, (terms.weights, data, terms.teacher))
    return [option for option, value in asked if value is None and (option != OPTIONS[2] or foreign(work, about))]


def _licences(work: Workspace, about: dict[str, Any], terms: Terms) -> list[str]:
    """What was said, and plainly what was not."""
    data = terms.data or rights.known(work.run.data.kind) or NOT_STATED
    lines = [f"These weights: {terms.weights or NOT_STATED}. The data: {data}."]
    others = foreign(work, about)
    if others:
        said = f"{', '.join(others)}: {terms.teacher or NOT_STATED}"
        lines.append(f"Trained from {said}; what its licence asks holds for these weights too.")
    elif terms.teacher:
        lines.append(f"The teacher: {terms.teacher}.")
    else:
        lines.append("No weights of others are behind these: every stage was trained by cmt-fast.")
    return lines
