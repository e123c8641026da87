"""The families of public checkpoints: their marks, which path and settings each was made for, what of it is left out.

The names themselves are in names.py, and how a file's family is told is in telling.py. What a file asks for is read off
the arguments stored with it, or off its shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Dit, Edm, Edm2, Mlp, Model
from cmt_fast.convert import names
from cmt_fast.convert.files import Source
from cmt_fast.models import dit, edm, edm2
from cmt_fast.safe_pickle.opcodes import shown

Weights = dict[str, Tensor]
KINDS: dict[str, Any] = {"dit": Dit, "edm2": Edm2, "edm": Edm, "mlp": Mlp}


class Asks(NamedTuple):
    """What a file says it was made for; None where it does not say. model: keys of the recipe's model, as built.

    affine: (a, b) of the latents z = a x + b that it was trained on, channel by channel or one for all; standard: k
    of latents k (x - mean) / std by the statistics of its own data. null_class: whether no label was trained beside the
    labels (label dropout).
    """

    model: dict[str, Any]
    side: int | None = None
    channels: int | None = None
    classes: int | None = None
    sigma_data: float | None = None
    affine: tuple[list[float], list[float]] | None = None
    against: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    null_class: bool | None = None
    standard: float | None = None


class Family(NamedTuple):
    """One project's networks. marks: patterns of names that each of its files has; left: of names that its map leaves out.

    tells: of names that no other family with the same marks has, one of which is enough.
    """

    name: str
    path: str | None
    marks: tuple[str, ...]
    names: Callable[[Weights], Weights]
    asks: Callable[[Source], Asks]
    left: dict[str, str]
    tells: tuple[str, ...] = ()

    def rename(self, theirs: Weights) -> tuple[Weights, dict[str, str]]:
        """Our names, and the file's names that are left out with the reason. Raises ValueError for what does not belong."""
        why = lambda name: next((text for pattern, text in self.left.items() if re.fullmatch(pattern, name)), None)
        try:
            ours = self.names(theirs)
        except (KeyError, IndexError, RuntimeError, AttributeError) as error:  # a map met a shape it does not know
            text = str(error).splitlines()[0] if str(error) else ""
            raise ValueError(f"its tensors are not that family's ({type(error).__name__}: {text})") from None
        return ours, {name: reason for name in theirs if (reason := why(name))}


def _arguments(source: Source) -> dict[str, Any]:
    return source.about.get("init_kwargs") or {}


def given(source: Source) -> dict[str, Any]:
    """What a training script stored of its arguments; of a config in sections (LightningDiT's) the keys that matter here."""
    args = source.about.get("args") or {}
    sections = ("model.", "transport.", "data.")
    return args | {k.partition(".")[2]: v for k, v in args.items() if k.startswith(sections) and k.count(".") == 1}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _numbers(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(type(v) is int for v in value) else None


def _unet_asks(source: Source, kind: str, conv: Tensor, parts: tuple[str, str, str], **more) -> Asks:
    """EDM's and EDM2's preconditioners keep their arguments; their U-Nets name them alike, and their tensors' names tell most.

    parts: what a file calls the encoder, a block's first convolution and its attention. Heads and sigma_data no shape tells.
    """
    said = {**_structure(source.tensors, parts, conv.shape[0]), **_arguments(source)}
    state = source.about.get("state") or {}
    model = {
        "kind": kind,
        "width": _whole(said.get("model_channels")),
        "multipliers": _numbers(said.get("channel_mult")),
        "blocks": _whole(said.get("num_blocks")),
        "attention": _numbers(said.get("attn_resolutions")),
        **more,
    }
    sigma = _number(said.get("sigma_data", state.get("sigma_data")))
    side, classes = _whole(said.get("img_resolution")), _whole(said.get("label_dim"))
    affine = _affine((source.about.get("encoder") or {}).get("state") or {})
    channels = conv.shape[1] - (kind == "edm2")  # EDM2's also sees a channel of ones
    return Asks(model, side, channels, classes, sigma, affine, null_class=_dropped(source, kind, classes))


def _structure(tensors: Weights, parts: tuple[str, str, str], width: int) -> dict[str, Any]:
    """EDM's arguments as its tensors' names and shapes tell them, by the names that it gives them: blocks are called by side."""
    encoder, first, attention = map(re.escape, parts)
    levels: dict[int, list[int]] = {}
    attended = []
    for name, x in tensors.items():
        if m := re.fullmatch(rf"{encoder}\.(\d+)x\1_block\d+\.({first}|{attention})\.weight", name):
            if m[2] == parts[1]:
                levels.setdefault(int(m[1]), []).append(x.shape[0])
            elif int(m[1]) not in attended:
                attended.append(int(m[1]))
    labels = next((x.shape[1] for n, x in tensors.items() if n.endswith(("emb_label.weight", "map_label.weight"))), 0)
    out: dict[str, Any] = {"model_channels": width, "label_dim": labels}
    if levels:
        out["img_resolution"] = max(levels)
        out["channel_mult"] = [levels[side][-1] // width for side in sorted(levels, reverse=True)]
        out["num_blocks"] = min(map(len, levels.values()))
        out["attn_resolutions"] = sorted(attended, reverse=True)
    return out


def _dropped(source: Source, kind: str, classes: int | None) -> bool | None:
    """Whether labels were dropped in training, so that a row of zeros is a class: never in EDM2, as said in EDM (default 0)."""
    if kind == "edm2" or not classes:
        return False
    said = _arguments(source)
    return (_number(said.get("label_dropout", 0)) or 0) > 0 if said else None


def _affine(encoder: dict[str, Any]) -> tuple[list[float], list[float]] | None:
    """scale and bias of EDM2's StabilityVAEEncoder, if they are that."""
    scale, bias = encoder.get("scale"), encoder.get("bias")
    if not (isinstance(scale, list) and isinstance(bias, list) and len(scale) == len(bias)):
        return None
    return (scale, bias) if all(isinstance(x, float) for x in scale + bias) and all(scale) else None


def _first_convolution(source: Source, start: str) -> Tensor:
    found = (t for n, t in source.tensors.items() if n.startswith(start) and n.endswith("_conv.weight") and t.ndim == 4)
    first = next(found, None)
    if first is None:
        raise ConfigError(f"FILE: {str(source.path)!r} has no first convolution {start}...")
    return first


def _edm2_asks(source: Source) -> Asks:
    conv = _first_convolution(source, "unet.enc.")
    head = _whole(_arguments(source).get("channels_per_head"))
    return _unet_asks(source, "edm2", conv, ("unet.enc", "conv_res0", "attn_qkv"), head=head)


def _edm_asks(source: Source) -> Asks:
    conv = _first_convolution(source, "model.enc.")
    adm = "model.out_conv.weight" in source.tensors
    augment = source.tensors.get("model.map_augment.weight")
    more = {
        "adm": adm,
        "ncsnpp": "model.map_noise.freqs" in source.tensors,
        "augment": 0 if augment is None else augment.shape[1],
    }
    asks = _unet_asks(source, "edm", conv, ("model.enc", "conv0", "qkv"), **more)
    kind = source.about.get("class")
    if kind not in (None, "EDMPrecond"):
        return asks._replace(against=(f"class: the file's network is a {kind}, what is built here is EDMPrecond",))
    return asks


def _own_asks(source: Source) -> Asks:
    """A file of `cmt ckpt export` holds the whole run it comes from. Raises ConfigError when that is not one."""
    run = (source.about.get("cmt") or {}).get("run")
    if run is None:
        return Asks({})
    try:
        model, sigma = TypeAdapter(Model).validate_python(run["model"]), _number(run["sigma_data"])
    except (ValidationError, KeyError, TypeError):
        raise ConfigError(f"FILE: {str(source.path)!r}: the run in its metadata is not of this version") from None
    # said by other keys, or no matter for the weights that are sampled with
    unread = ("size", "preset", "dropout", "checkpoint_activations", "log_variance")
    null = _own_null(source.about["cmt"])
    return Asks({k: v for k, v in built(model).items() if k not in unread}, sigma_data=sigma, null_class=null)


def _own_null(about: dict[str, Any]) -> bool | None:
    """Whether a stage of the run in a file of ours, or the import it begins with, dropped labels; None where it is not said."""
    node, run, known = about.get("lineage"), about["run"], None
    while isinstance(node, dict):
        if isinstance(node.get("null_class"), bool):
            return known or node["null_class"]
        stage = run.get(node.get("stage")) if isinstance(node.get("stage"), str) else None
        if isinstance(stage, dict):
            known = known or bool(_number(stage.get("label_dropout")))
        node = node.get("parent")
    return known


def built(model: Any) -> dict[str, Any]:
    """The numbers that a recipe's model is built with: its preset's, or those given."""
    given = {k: v for k, v in vars(model).items() if v is not None and not k.startswith("_")}
    if isinstance(model, Edm2):
        return {"width": edm2.SIZES[model.size][0], **given}
    if isinstance(model, Edm):
        return {**edm.PRESETS[model.preset], **given}
    if isinstance(model, Dit):
        head = {"wide_head": vars(model.wide_head)} if model.wide_head else {}
        return {**dict(zip(("width", "depth", "heads"), dit.SIZES[model.size])), **given, **head}
    return given


def _transformer_asks(source: Source, **more) -> Asks:
    """DiT and its kin keep few arguments; their shapes say everything but the number of heads, which the size does."""
    tensors, said = source.tensors, given(source)
    patches = tensors["x_embedder.proj.weight"]
    if patches.ndim != 4:
        raise ConfigError(f"FILE: {str(source.path)!r}: x_embedder.proj.weight is {tuple(patches.shape)}, not 4-D")
    width, channels, patch = patches.shape[:3]
    depth = len({tuple(name.split(".")[:2]) for name in tensors if re.match(r"(decoder_)?blocks\.\d+\.", name)})
    model: dict[str, Any] = {"kind": "dit", "embeddings": "dit", "patch": patch, "width": width, "depth": depth}
    model["heads"] = _heads(tensors, width, depth)
    model["qk_norm"] = "blocks.0.attn.q_norm.weight" in tensors
    position = tensors.get("pos_embed")
    side = math.isqrt(position.shape[1]) * patch if position is not None and position.ndim == 3 else None
    against = [
        f"{key}: the file's network was trained with {key} {shown(said[key])!r}, what is read here is {only}"
        for key, only in (("prediction", "velocity"), ("path_type", "Linear"))
        if key in said and str(said[key]).lower() not in (only.lower(), "v")
    ]
    classes, null, why = _table(tensors.get("y_embedder.embedding_table.weight"), said)
    return Asks({**model, **more}, side, channels, classes, None, SD, tuple(against + why), null_class=null)


def _ditdh_asks(source: Source) -> Asks:
    """DiT^DH's file: RAE's training stores no arguments; its rotary tables tell the heads."""
    tensors = source.tensors
    own, patches = tensors["s_embedder.proj.weight"], tensors.get("x_embedder.proj.weight")
    if patches is None or not own.ndim == patches.ndim == 4:
        raise ConfigError(f"FILE: {str(source.path)!r}: x_embedder.proj.weight is missing or not 4-D")
    width, wide = own.shape[0], patches.shape[0]
    depth, more = names.wide_depths(tensors, width)
    of = lambda block, table, columns: _per_head(
        tensors, f"blocks.{block}.attn.q_norm.weight", f"{table}_feat_rope", columns
    )
    head = {"width": wide, "depth": more} | ({"heads": n} if (n := of(depth, "dec", wide)) else {})
    model = {
        "kind": "dit", "embeddings": "gaussian", "patch": own.shape[2], "width": width, "depth": depth,
        "heads": of(0, "enc", width), "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "mlp": "swiglu" if "blocks.0.mlp.w12.weight" in tensors else "gelu",
        "norm": "rms" if "blocks.0.norm1.weight" in tensors else "layer",
        "rope": "enc_feat_rope.freqs_cos" in tensors, "wide_head": head,
    }  # fmt: skip
    position = tensors.get("pos_embed")
    side = math.isqrt(position.shape[1]) * own.shape[2] if position is not None and position.ndim == 3 else None
    classes, null, why = _table(tensors.get("y_embedder.embedding_table.weight"), given(source))
    latents = "its latents are those that RAE's own encoder gives, normalised by its statistics of every number"
    notes = (latents,) if "r_embedder.mlp.0.weight" in tensors else (latents, STARTS)
    return Asks(model, side, own.shape[1], classes, None, ([1.0], [0.0]), tuple(why), notes, null)


def _per_head(tensors: Weights, norm: str, table: str, width: int) -> int | None:
    """Heads of `width` columns by a norm or a rotary table over one head; None where neither is there."""
    one = tensors.get(norm, tensors.get(f"{table}.freqs_cos"))
    return width // one.shape[-1] if one is not None and one.ndim and one.shape[-1] else None


def _heads(tensors: Weights, width: int, depth: int) -> int | None:
    """The heads of a published size, or those that a norm or a table over one head tells; None where nothing does."""
    one = tensors.get("blocks.0.attn.q_norm.weight", tensors.get("feat_rope.freqs_cos"))
    if one is not None and one.ndim and one.shape[-1] and width % one.shape[-1] == 0:
        return width // one.shape[-1]
    return next((h for w, d, h in dit.SIZES.values() if (w, d) == (width, depth)), None)


def _table(table: Tensor | None, said: dict[str, Any]) -> tuple[int, bool, list[str]]:
    """Classes, whether the row for no label was trained, and what is against the file, of a table of labels.

    All these projects drop labels in a tenth of training unless told otherwise, and their table has a row for it then. A
    table without that row fits no network here: none is made up.
    """
    if table is None:
        return 0, False, []
    rows, known = table.shape[0], _whole(said.get("num_classes"))
    if known == rows:
        text = f"the file's table has {rows} rows for {known} classes and none for no label, which the network here has"
        return rows, False, [f"y_embedder: {text}"]
    return rows - 1, _number(said.get("cfg_prob")) != 0, []


def _dit_asks(source: Source) -> Asks:
    asks = _transformer_asks(source, mlp="gelu", norm="layer", rope=False, precondition="ddpm")
    steps = given(source).get("diffusion_steps", 1000)
    against = (
        () if steps == 1000 else (f"diffusion_steps: the file's network was trained with {shown(steps)}, not 1000",)
    )
    notes = ("it predicts the noise of DDPM's 1000 steps; of a learned variance nothing is kept",)
    return asks._replace(notes=notes, against=asks.against + against)


def _sit_asks(source: Source) -> Asks:
    return _transformer_asks(source, mlp="gelu", norm="layer", rope=False)._replace(notes=(TURNED, STARTS))


def _repa_asks(source: Source) -> Asks:
    return _transformer_asks(source, mlp="gelu", norm="layer", rope=False)._replace(notes=(STARTS,))


def _meanflow_asks(source: Source) -> Asks:
    return _transformer_asks(source, mlp="gelu", norm="layer", rope=False)


def _lightningdit_asks(source: Source) -> Asks:
    gated, rms = "blocks.0.mlp.w12.weight" in source.tensors, "blocks.0.norm1.weight" in source.tensors
    rope = "feat_rope.freqs_cos" in source.tensors
    asks = _transformer_asks(source, mlp="swiglu" if gated else "gelu", norm="rms" if rms else "layer", rope=rope)
    if given(source).get("use_rope") and not rope:
        asks = asks._replace(
            against=(*asks.against, "feat_rope: the file's network turns its queries, its tables are missing")
        )
    said, turned = given(source), (TURNED, STARTS)
    factor = _number(said.get("latent_multiplier"))
    if said.get("latent_norm") is False:
        return asks._replace(affine=([factor or 0.18215], [0.0]), notes=turned)
    latents = "it was trained on latents (x - mean) / std of a file that is not in it, VA-VAE's as published"
    set_to = f"set data.mean and data.std to those, or leave them out for a store's own, and data.scale={factor or 1:g}"
    return asks._replace(affine=None, standard=factor or 1.0, notes=(*turned, f"{latents}; {set_to}"))


SD = ([0.18215], [0.0])  # DiT, SiT, REPA and MeanFlow are trained behind Stable Diffusion's autoencoder, scaled so
TURNED = "its time runs from noise to data; time and velocity are turned round in the weights, so t = 1 is noise here"
STARTS = "it knows one time; the embedding of t - r that average velocities need starts at zero"
POSITION = {
    "pos_embed": "a constant of the architecture, checked",
    r"((enc|dec)_)?feat_rope\..*": "a constant of the architecture",
}
PROJECTORS = {r"projectors\..*": "read by its training alone"}
OURS = Family("cmt-fast", None, (), lambda theirs: dict(theirs), _own_asks, {})
PATCHES = r"x_embedder\.proj\.weight"
ROPE = r"feat_rope\..*"
# the first families have marks of their own; those of transformers share theirs
FAMILIES = (
    Family("edm2", "ve", (r"unet\.emb_fourier\.freqs", r"unet\.out_gain"), names.edm2, _edm2_asks, {}),
    Family("edm", "ve", (r"model\.map_layer0\.weight",), names.edm, _edm_asks,
           {r".*\.resample_filter": "a constant of the architecture, checked"}),
    Family("ditdh", "linear", (PATCHES, r"s_embedder\.proj\.weight"), names.ditdh, _ditdh_asks, POSITION, (r"s_embedder\..*",)),
    Family("lightningdit", "linear", (PATCHES,), names.lightningdit, _lightningdit_asks, POSITION,
           (r"blocks\.0\.mlp\.w12\.weight", r"blocks\.0\.norm1\.weight", ROPE)),
    Family("meanflow", "linear", (PATCHES, r"r_embedder\..*"), names.meanflow, _meanflow_asks, POSITION, (r"r_embedder\..*",)),
    Family("repa", "linear", (PATCHES,), names.repa, _repa_asks, POSITION | PROJECTORS,
           (r"projectors\..*", r"decoder_blocks\..*")),
    Family("sit", "linear", (PATCHES,), names.sit, _sit_asks, POSITION),
    Family("dit", "ve", (PATCHES,), names.dit, _dit_asks, POSITION),
)  # fmt: skip
KNOWN = {f.name: f for f in (*FAMILIES, OURS)}
