"""A stage's weights under the names of another project, for those who use its code: EDM2, DiT, SiT, MeanFlow's SiT.

The maps of names.py the other way round. What is written is read back through those maps before it is kept: the network that
`cmt ckpt import` makes of the file is the stage's, bit for bit. What a project's network has no place for is refused, by the
tensor's or the key's name. The file is a state dict: .safetensors, or a .pt of tensors alone, which torch.load takes with
weights_only. It loads with the project's defaults: DiT's and SiT's last layers have rows for a learned variance, here zeros.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION
from cmt_fast.convert import families, names
from cmt_fast.convert.exporting import Export, claim
from cmt_fast.models.dit import positions
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import files as files_

Weights = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pt")
TRANSFORMER = {"embeddings": "dit", "mlp": "gelu", "norm": "layer", "rope": False, "qk_norm": False, "wide_head": None}


class Target(NamedTuple):
    """A project's networks. model: keys of the recipe's model that they are; names: ours -> theirs; arguments: of their class."""

    kind: str
    path: str
    model: dict[str, Any]
    names: Callable[[Export, Weights], Weights]
    arguments: Callable[[Workspace], dict[str, Any]]
    builds: str


def write(export: Export, family: str, out: Path) -> str:
    """Write the file; what it is, as lines. Raises ConfigError for what the project's network cannot be."""
    target, work = TARGETS[family], export.work
    claim(out, *SUFFIXES)
    _check(target, family, work)
    export = _sampled(export, target)
    theirs = {k: v.contiguous() for k, v in target.names(export, export.weights).items()}
    how = _read_back(export, family, theirs)
    arguments = target.arguments(work)
    lineage = export.about["lineage"]
    about = {"format": "pt", "family": family, "made_by": f"cmt-fast {export.about['version']}"}
    about |= {"init_kwargs": json.dumps(arguments), "digest": export.about["digest"], "lineage": json.dumps(lineage)}
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        if out.suffix == ".pt":
            try:
                torch.save(theirs, temporary)
            except RuntimeError as error:  # of a full disk
                raise OSError(f"{out}: cannot be written ({str(error).splitlines()[0]})") from None
        else:
            files_.save_tensors(temporary, theirs, about)
        files_.sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    named = ", ".join(f"{k}={v}" for k, v in arguments.items())
    lines = [f"{out}: {target.builds}({named})", f"read back by names.{family} it is the stage's network, {how}"]
    return "\n".join(lines + _latents(work))


def _check(target: Target, family: str, work: Workspace) -> None:
    """Raises ConfigError where the run's network is not of that kind."""
    run = work.run
    if run.model.kind != target.kind or run.path != target.path:
        raise ConfigError(
            f"--format: {family} is of model.kind {target.kind} on path {target.path}, this run's network is {run.model.kind} on "
            f"{run.path}{_others(run.model.kind, run.path)}"
        )
    for key, value in target.model.items():
        if (own := getattr(run.model, key)) != value:
            raise ConfigError(f"--format: {family} has model.{key} {value!r}, this run's is {own!r}")
    if target.kind == "dit" and not work.data.classes:
        raise ConfigError(f"--format: a network of {family} has a table of labels, this one takes none")


def _sampled(export: Export, target: Target) -> Export:
    """Without the log variance of `model.log_variance`, which weighs a loss: of these projects only EDM2 has a place for one."""
    if target.kind == "edm2":
        return export
    return export._replace(weights={k: v for k, v in export.weights.items() if not k.startswith("net.log_variance.")})


def _others(kind: str, path: str) -> str:
    """What else the network could be written as."""
    fit = [name for name, t in TARGETS.items() if (t.kind, t.path) == (kind, path)]
    return f"; there is {' or '.join(fit)}" if fit else "; safetensors and onnx take any"


def _read_back(export: Export, family: str, theirs: Weights) -> str:
    """How near the map of names.py comes to the stage's tensors, in words: to the bit but for what SiT's one time asks for.

    Raises ConfigError where it does not: what the project's networks have no place for.
    """
    try:
        back, _ = families.KNOWN[family].rename(theirs)
    except ValueError as error:
        raise ConfigError(f"--format: {family}: {error}") from None
    ours = {k: v for k, v in export.weights.items() if not (family == "sit" and k.startswith("net.duration."))}
    back = {k: v.float() for k, v in back.items() if k in ours}
    turned = "net.time.hidden.weight" if family == "sit" else ""
    folded = "net.time.out.bias" if family == "sit" and _constant(export) is not None else ""
    different = [k for k, v in ours.items() if k != folded and not (k in back and torch.equal(back[k], v))]
    if different and not (different == [turned] and torch.allclose(back[turned], ours[turned], rtol=1e-6, atol=1e-7)):
        raise ConfigError(f"--format: {different[0]} cannot be written as {family}")
    if folded:
        return "but for rounding: the constant of its embedding of t - r went into a bias"
    return "but for the last place of the first layer of its time" if different else "bit for bit"


def _latents(work: Workspace) -> list[str]:
    """How the latents that the network takes are scaled: the user of its file has to do the same."""
    n = getattr(work.data, "normalisation", None)
    if work.decoding.latents is None or n is None:
        return []
    text = lambda values: "[" + ",".join(f"{v + 0.0:.6g}" for v in values) + "]"
    a, b = [n.scale / s for s in n.std], [-m * n.scale / s for m, s in zip(n.mean, n.std)]
    return [f"it takes latents z = a x + b of the autoencoder's x, with a {text(a)}, b {text(b)}"]


# ---------------------------------------------------------------------------------------------- EDM2


def edm2(export: Export, ours: Weights) -> Weights:
    """Ours as EDM2's `Precond` has them: all tensors as they are. Raises ConfigError for one that it has not."""
    side = export.work.data.shape[1]
    block = {"emb": "emb_linear", "conv1": "conv_res0", "conv2": "conv_res1", "skip": "conv_skip"}
    block |= {"qkv": "attn_qkv", "proj": "attn_proj"}
    wave = {"frequency": "freqs", "phase": "phases"}
    table: list[tuple[str, Callable[[re.Match], str]]] = [
        (r"net\.fourier\.(frequency|phase)", lambda m: f"unet.emb_fourier.{wave[m[1]]}"),
        (r"net\.log_variance\.fourier\.(frequency|phase)", lambda m: f"logvar_fourier.{wave[m[1]]}"),
        (r"net\.log_variance\.out\.weight", lambda m: "logvar_linear.weight"),
        (r"net\.(noise|label)\.weight", lambda m: f"unet.emb_{m[1]}.weight"),
        (r"net\.conv\.weight", lambda m: f"unet.enc.{side}x{side}_conv.weight"),
        (r"net\.out_gain", lambda m: "unet.out_gain"),
        (r"net\.out\.weight", lambda m: "unet.out_conv.weight"),
        (r"net\.(enc|dec)oder\.(\w+)\.gain", lambda m: f"unet.{m[1]}.{m[2]}.emb_gain"),
        (
            rf"net\.(enc|dec)oder\.(\w+)\.({'|'.join(block)})\.weight",
            lambda m: f"unet.{m[1]}.{m[2]}.{block[m[3]]}.weight",
        ),
    ]
    return _renamed(ours, table, "edm2")


def _edm2_arguments(work: Workspace) -> dict[str, Any]:
    model = families.built(work.run.model)
    channels, side, _ = work.data.shape
    return {
        "img_resolution": side,
        "img_channels": channels,
        "label_dim": work.data.classes if model.get("conditional", True) else 0,
        "sigma_data": work.run.sigma_data,
        "model_channels": model["width"],
        "channel_mult": list(model["multipliers"]),
        "num_blocks": model["blocks"],
        "attn_resolutions": list(model["attention"]),
        "channels_per_head": model["head"],
    }


# ---------------------------------------------------------------------------------------------- DiT and its kin


def dit(export: Export, ours: Weights) -> Weights:
    """Ours as DiT has them, with its fixed positions, and zeros for the learned variance."""
    return _transformer(export, ours, "dit")


def meanflow(export: Export, ours: Weights) -> Weights:
    """Ours as MeanFlow's SiT of two times has them."""
    return _transformer(export, ours, "meanflow")


def sit(export: Export, ours: Weights) -> Weights:
    """Ours as SiT has them: one time, that runs from noise to data, and the velocity with it.

    A diffusion model's embedding of t - r is a constant, and goes into the bias of the time's. The turned layer is in float64:
    turned back, it is rounded to the weights that it came from. Raises ConfigError for a network of two times.
    """
    constant = _constant(export)
    ours = {k: v for k, v in ours.items() if not k.startswith("net.duration.")}
    if constant is not None:
        ours["net.time.out.bias"] = ours["net.time.out.bias"] + constant
    theirs = _transformer(export, ours, "sit")
    theirs["t_embedder.mlp.0.weight"] = theirs["t_embedder.mlp.0.weight"].double()
    return names.reversed_time(theirs)


def _constant(export: Export) -> Tensor | None:
    """What a network that is only called at r = t adds for t - r (width,); None where that is zero.

    Raises ConfigError where it is called at other r.
    """
    work = export.work
    if not any(export.weights[f"net.duration.out.{end}"].any() for end in ("weight", "bias")):
        return None
    if work.run.stages[export.stage].objective.kind not in DIFFUSION:
        raise ConfigError(
            "--format: net.duration.out.weight, of the embedding of t - r, has no place in sit, which knows one time; "
            "--format meanflow has one"
        )
    net = work.build()
    net.load_state_dict(export.weights)
    with torch.no_grad():
        return net.net.duration(torch.zeros(1))[0]


def _transformer(export: Export, ours: Weights, family: str) -> Weights:
    """The tensors that DiT and its kin share, laid out as theirs."""
    channels, side, _ = export.work.data.shape
    patch = export.work.run.model.patch
    layer = {
        "qkv": "attn.qkv",
        "proj": "attn.proj",
        "modulation": "adaLN_modulation.1",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    time, part = {"time": "t", "duration": "r"}, {"hidden": "0", "out": "2"}
    final = {"final": "linear", "final_modulation": "adaLN_modulation.1"}
    table: list[tuple[str, Callable[[re.Match], str]]] = [
        (r"net\.embed\.(\w+)", lambda m: f"x_embedder.proj.{m[1]}"),
        (r"net\.(time|duration)\.(hidden|out)\.(\w+)", lambda m: f"{time[m[1]]}_embedder.mlp.{part[m[2]]}.{m[3]}"),
        (r"net\.label\.table", lambda m: "y_embedder.embedding_table.weight"),
        (rf"net\.blocks\.(\d+)\.({'|'.join(layer)})\.(\w+)", lambda m: f"blocks.{m[1]}.{layer[m[2]]}.{m[3]}"),
        (r"net\.(final|final_modulation)\.(\w+)", lambda m: f"final_layer.{final[m[1]]}.{m[2]}"),
    ]
    theirs = _renamed(ours, table, family)
    patches = theirs["x_embedder.proj.weight"]
    theirs["x_embedder.proj.weight"] = patches.unflatten(1, (channels, patch, patch))
    for end in ("weight", "bias"):
        rows = theirs[f"final_layer.linear.{end}"].unflatten(0, (channels, patch, patch)).movedim(0, 2)
        theirs[f"final_layer.linear.{end}"] = torch.cat((rows, torch.zeros_like(rows)), 2).flatten(0, 2)
    return {"pos_embed": positions(side // patch, len(patches), columns_first=True)[None], **theirs}


def _transformer_arguments(work: Workspace) -> dict[str, Any]:
    model, (channels, side, _) = families.built(work.run.model), work.data.shape
    return {
        "input_size": side,
        "patch_size": model["patch"],
        "in_channels": channels,
        "hidden_size": model["width"],
        "depth": model["depth"],
        "num_heads": model["heads"],
        "num_classes": work.data.classes,
    }


def _renamed(ours: Weights, table: list[tuple[str, Callable[[re.Match], str]]], family: str) -> Weights:
    """Every tensor under the name that the first fitting row of the table gives. Raises ConfigError for one without."""
    theirs = {}
    for name, tensor in ours.items():
        found = next(((m, to) for pattern, to in table if (m := re.fullmatch(pattern, name))), None)
        if found is None:
            raise ConfigError(f"--format: {name} has no place in a network of {family}")
        theirs[found[1](found[0])] = tensor
    return theirs


TARGETS = {
    "edm2": Target("edm2", "ve", {}, edm2, _edm2_arguments, "Precond"),
    "dit": Target("dit", "ve", {**TRANSFORMER, "precondition": "ddpm"}, dit, _transformer_arguments, "DiT"),
    "sit": Target("dit", "linear", TRANSFORMER, sit, _transformer_arguments, "SiT"),
    "meanflow": Target("dit", "linear", TRANSFORMER, meanflow, _transformer_arguments, "SiT"),
}
