"""Imported DiT and SiT give what their projects' own code gives, from every kind of file, in fp32, fp16 and bf16.

published_halves.json was written by running DiT's and SiT's own forwards (facebookresearch/DiT ed81ce2, willisma/SiT 947f95b,
with timm's three layers by their definition) in fp32, on the weights of published.json rounded to float16 or bfloat16 and with
the position embedding that their constructors compute. Where they take the file's rounded copy of that constant, as their
load_state_dict does, their outputs move by 3e-5 (float16) and 5e-4 (bfloat16): that rounding is not taken over here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from cmt_fast import cli, models
from cmt_fast.config.schema import Model
from cmt_fast.convert import names
from cmt_fast.engine import load_named
from cmt_fast.storage import checkpoint
from tests.cost.test_published import CASES, outputs, relative, weights
from tests.fixtures import small

BY_ID = {case["id"]: case for case in CASES}
HALVES = json.loads((Path(__file__).parents[1] / "fixtures" / "published_halves.json").read_text())
KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAID = {
    "sit": {"model": "SiT-XL/2", "num_classes": 5, "path_type": "Linear", "prediction": "velocity"},
    "dit": {"model": "DiT-XL/2", "num_classes": 5, "image_size": 256, "vae": "ema"},
}


def written(path: Path, state: dict, how: str, family: str) -> list[str]:
    """The file in one of its forms, and what must be said of it."""
    if how == "script":
        torch.save({"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(**SAID[family])}, path)
        return []
    if how == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how != "legacy")
    return ["--as", family]


@pytest.mark.parametrize(
    "kind, how",
    [("float32", how) for how in ("script", "bare", "legacy", "safetensors")]
    + [("float16", "script"), ("float16", "safetensors"), ("bfloat16", "bare"), ("bfloat16", "safetensors")],
)
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_imported_files_give_what_the_projects_own_code_gives(tmp_path, capsys, family, kind, how):
    case = BY_ID[family]
    scale = {"mean": [0.0] * 4, "std": [1.0] * 4, "scale": 0.18215}
    recipe = small.elsewhere(tmp_path, case["model"], case["path"], expects={"shape": [4, 8, 8], "classes": 5}, **scale)
    say = written(tmp_path / "net", {k: v.to(KINDS[kind]) for k, v in weights(case).items()}, how, family)
    code = cli.main(
        ["ckpt", "import", str(tmp_path / "net"), *say, "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    )
    assert code == 0, capsys.readouterr().err
    model = TypeAdapter(Model).validate_python(case["model"])
    net = models.build(model, case["path"], 0.5, (4, 8, 8), 5)
    load_named(net, checkpoint.complete(tmp_path / "run" / "pre").tensors("ema-0"))
    wanted = torch.tensor(case["y"] if kind == "float32" else HALVES[family][kind])
    assert relative(outputs(net.eval(), case), wanted) < 1e-6
    if kind != "float32":  # the rounding of the weights is far above that
        assert relative(wanted, torch.tensor(case["y"])) > 1e-4


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_rounded_position_embedding_is_accepted_and_a_wrong_one_is_not(kind):
    state = weights(BY_ID["sit"])
    own = state["pos_embed"]
    rounded = own.to(KINDS[kind]).float()  # also of a file that was widened again
    assert (rounded - own).abs().max() > 1e-4
    assert names.sit({**state, "pos_embed": rounded}).keys() == names.sit(state).keys()
    moved, step = rounded.clone(), torch.finfo(KINDS[kind]).eps
    moved[0, 1, 0] *= 1 + 2 * step  # two units in the last place beside the constant
    rows = own.view(1, 2, 2, -1).transpose(1, 2).reshape(own.shape).to(KINDS[kind]).float()
    for wrong in (moved, rows, torch.zeros_like(own), own + 2e-4):
        with pytest.raises(ValueError, match="pos_embed"):
            names.sit({**state, "pos_embed": wrong})
