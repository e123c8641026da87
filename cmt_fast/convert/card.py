"""The model card of an exported pipeline: what it is, where it comes from, how it was judged, how it is loaded.

Front matter is YAML as the hub reads it; below it every word of a user (names, paths, an imported file's arguments) is escaped.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION, STAGES
from cmt_fast.render import templates
from cmt_fast.render.templates import Group, Section, Table
from cmt_fast.run.workspace import Workspace
from cmt_fast.safe_pickle.opcodes import shown
from cmt_fast.storage import checkpoint, metrics_log
from cmt_fast.usage import ledger

HOW = """from diffusers import DiffusionPipeline  # with cmt-fast installed: pip install cmt-fast
pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipe({arguments}).images
"""


def markdown(
    work: Workspace, stage: str, about: dict[str, Any], license: str | None, latents: dict[str, Any] | None
) -> str:
    """README.md of the folder. license: the hub's word for it, "unknown" where nothing is said. Raises ConfigError."""
    run, settings = work.run, work.run.stages[stage]
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", license):
        raise ConfigError(f"--license: {shown(license)!r} is no licence's identifier, such as apache-2.0")
    few = settings.objective.kind not in DIFFUSION
    shape = " x ".join(map(str, work.data.shape))
    spent = _spent(work, about)
    front = {
        "license": license or "unknown",
        "library_name": "diffusers",
        "tags": ["consistency-mid-training", "cmt-fast", "few-step-generation"],
        "cmt_fast": {"version": about["version"], "digest": about["digest"], **spent},
    }
    kind = "A generator of few steps" if few else "A diffusion model"
    text = [
        f"{kind} for {run.data.kind} ({shape}, {work.data.classes or 'no'} classes), stage {stage} of the recipe {run.name}: "
        f"{run.model.kind}, {work.parameters:,} parameters, path {run.path}, trained with cmt-fast {about['version']}.",
        f"{_spent_text(spent)} Licence: {license or 'unknown; nothing was said of it'}.",
    ]
    arguments = "class_labels=[0, 1], " if work.data.classes else "batch_size=2, "
    arguments += f"num_inference_steps={run.eval.steps[0] if few else run.sampler.teacher_steps}, seed=0"
    if latents is not None:
        text.append(
            f"It makes latents of the autoencoder {latents['vae']}: z = {latents['scale']:g} (x - mean) / std, "
            f"mean {latents['mean']}, std {latents['std']}."
        )
    sections = [
        Section("", text, [], "Loaded and sampled in three lines", HOW.replace("{arguments}", arguments)),
        Section("Figures", _judge(work, stage, about), [Group(_figures(work, stage, about), wide=True)]),
        Section("Sampler", [], [Group([_sampler(work)], wide=True)]),
        Section("Lineage", _licences(about), [Group([_lineage(about)], wide=True)]),
        Section("Recipe", [], [], "The resolved run", yaml.safe_dump(loading.dump(run), sort_keys=False)),
    ]
    page = templates.markdown(run.name, sections)
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{page}"


def _spent(work: Workspace, about: dict[str, Any]) -> dict[str, Any]:
    """GPU-hours, core-hours and kWh of the stages behind these weights that were trained by us, and their names.

    Null where one of them was not billed from its start; what an imported file cost nobody knows, and is not in it.
    """
    bills, names, node = [], [], about["lineage"]
    while node and not node.get("file"):
        if node["nimg"]:
            names.insert(0, node["stage"])
            bills.append(_bill(work, node))
        node = node.get("parent")
    whole = [b for b in bills if b and not b.from_nimg]
    if not whole or len(whole) < len(bills):
        return {"gpu_hours": None, "core_hours": None, "kwh": None, "stages": names}
    gpu, core = (ledger.total(whole, unit) for unit in ("gpu", "core"))
    kwh = None if core.seconds else gpu.kwh
    return {"gpu_hours": gpu.hours, "core_hours": core.hours, "kwh": kwh, "stages": names}


def _bill(work: Workspace, node: dict[str, Any]) -> ledger.Usage | None:
    """The bill of a stage in the lineage, if the stage found here still is the one that is meant."""
    if node["stage"] not in STAGES:
        return None
    folder = work.stage_dir(node["stage"])
    with contextlib.suppress(checkpoint.CheckpointError):
        found = checkpoint.latest(folder)
        if found and node["ema"] in [file["xxh3_128"] for file in found.manifest["files"].values()]:
            return ledger.of_stage(folder, found.manifest)
    return None


def _spent_text(spent: dict[str, Any]) -> str:
    """The same as a sentence."""
    if spent["gpu_hours"] is None:
        return "GPU-hours: null (not recorded)."
    kinds = (("gpu_hours", "GPU-hours"), ("core_hours", "core-hours"))
    parts = [f"{spent[key]:.4g} {kind}" for key, kind in kinds if spent[key]]
    energy = "null kWh (not measured)" if spent["kwh"] is None else f"{spent['kwh']:.4g} kWh"
    stages = ", ".join(spent["stages"])
    return f"{' and '.join(parts)}, {energy}: stages {stages}, with their evaluations and what kills took."


def _stored(work: Workspace, stage: str, about: dict[str, Any]) -> dict[str, Any] | None:
    """What `cmt report` wrote of these very weights."""
    for folder in (work.folder, work.parents):
        try:
            found = json.loads((folder / stage / "figures.json").read_text("utf-8"))
            if found["key"]["ema"] == about["lineage"]["ema"] and found["key"]["eval"]["n"]:
                return found
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _judge(work: Workspace, stage: str, about: dict[str, Any]) -> list[str]:
    found = _stored(work, stage, about)
    if found is not None:
        settings = found["key"]
        n, seed = settings["eval"]["n"], settings["eval"]["seed"]
        return [f"{n:,} samples of these weights, seed {seed}; features {settings.get('extractor')}."]
    if _evaluated(work, stage):
        return [f"The last evaluation during training, {work.run.eval.n_during:,} samples."]
    return ["Not evaluated."]


def _evaluated(work: Workspace, stage: str) -> dict[str, Any] | None:
    rows = metrics_log.read(Path(work.stage_dir(stage)) / metrics_log.METRICS)
    return next((row for row in reversed(rows) if row.get("kind") == "eval"), None)


def _figures(work: Workspace, stage: str, about: dict[str, Any]) -> list[Table]:
    """Rows by steps: from figures.json of the same weights, or the last evaluation in training."""
    found, last = _stored(work, stage, about), _evaluated(work, stage)
    entries: list[tuple[str, dict[str, Any]]] = []
    if found is not None:
        for key, how in (("few", "few-step"), ("solver", "ODE solver")):
            entries += [(f"{k}, {how}", v) for k, v in (found.get(key) or {}).items() if v]
    elif last is not None:
        entries = [(str(k), v) for k, v in (last.get("steps") or {}).items() if v]
    columns = sorted({c for _, figures in entries for c in figures})
    rows = [[title, *(f"{figures[c]:.4g}" if c in figures else "-" for c in columns)] for title, figures in entries]
    return [Table("", ["steps", *columns], rows)] if rows else []


def _sampler(work: Workspace) -> Table:
    tree = loading.dump(work.run)["sampler"]
    return Table("", ["setting", "value"], [[k, json.dumps(v)] for k, v in tree.items()], left=2)


def _lineage(about: dict[str, Any]) -> Table:
    rows, node = [], about["lineage"]
    while node:
        file = f"{node['file']}, {node['family']}, entry {node['entry'] or 'only one'}" if node.get("file") else ""
        rows.append([node["stage"], f"{node['nimg']:,}", (node["config"] or "-")[:12], node["ema"][:16], file])
        node = node.get("parent")
    return Table("Newest first", ["stage", "images", "config digest", "EMA or file checksum", "file"], rows, left=5)


def _licences(about: dict[str, Any]) -> list[str]:
    node = about["lineage"]
    while node and not node.get("file"):
        node = node.get("parent")
    if not node:
        return []
    return [
        f"Trained from {node['file']} (sha256 {node['sha256']}); what its licence asks holds for these weights too."
    ]
