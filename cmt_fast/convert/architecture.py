"""A recipe's model as the standalone code takes it: its file, its class and every number of it, no preset left to look up."""

from __future__ import annotations

from typing import Any, NamedTuple

from cmt_fast.config.schema import Dit, Edm, Edm2, Mlp, Run
from cmt_fast.models import dit, edm, edm2


class Architecture(NamedTuple):
    """file: of cmt_fast/convert/standalone, without .py; name: its class; arguments: of the class, as JSON types."""

    file: str
    name: str
    arguments: dict[str, Any]


def of(run: Run, shape: tuple[int, ...], classes: int) -> Architecture:
    """Of a run on data of `shape` and so many classes; a network that reads no labels has 0 of them."""
    model, two_times = run.model, run.path == "linear"
    classes = classes if getattr(model, "conditional", True) else 0
    if isinstance(model, Mlp):
        sizes = {"width": model.width, "depth": model.depth, **({"guided": True} if model.guided else {})}
        return Architecture("cmt_dit", "CmtMlp", {"dim": shape[0], "classes": classes, **sizes, "two_times": two_times})
    common = {"channels": shape[0], "side": shape[1], "classes": classes, "two_times": two_times}
    if isinstance(model, Dit):
        names = ("width", "depth", "heads")
        own = {name: getattr(model, name) or preset for name, preset in zip(names, dit.SIZES[model.size])}
        own |= {name: getattr(model, name) for name in ("patch", "qk_norm", "rope", "mlp", "norm", "embeddings")}
        if h := model.wide_head:
            own |= {"wide_head": [h.width, h.depth, h.heads]}
        own |= {"guided": True} if model.guided else {}
        return Architecture("cmt_dit", "CmtDiT", common | own)
    if isinstance(model, Edm2):
        own = {"width": model.width or edm2.SIZES[model.size][0], "blocks": model.blocks, "head": model.head}
        own |= {"multipliers": list(model.multipliers), "attention": list(model.attention)}
        return Architecture("cmt_edm2", "CmtEdm2", common | own)
    assert isinstance(model, Edm), model
    names = ("width", "multipliers", "blocks", "attention")
    own = edm.PRESETS[model.preset] | {k: v for k in names if (v := getattr(model, k)) is not None}
    own = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items() if k in (*names, "adm", "ncsnpp")}
    return Architecture("cmt_edm", "CmtEdm", common | own)
