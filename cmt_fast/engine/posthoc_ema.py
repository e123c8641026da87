"""Post-hoc EMA: rebuild any power-function profile from a stage's snapshots (Karras et al. 2024, EDM2, sec. 3.2)."""

from __future__ import annotations

from pathlib import Path

import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.engine import ema
from cmt_fast.storage import checkpoint, files
from cmt_fast.storage.files import save_tensors


def reconstruct(stage_dir: Path, sigma_rel: float | None, out: Path | None) -> None:
    """Write the EMA of relative width sigma_rel at the last snapshot's step to `out` (.safetensors).

    Raises ConfigError when the stage keeps no snapshots: it needs a power EMA and `snapshot_every_nimg`.
    """
    if sigma_rel is None or not 0 < sigma_rel < 0.28:
        raise ConfigError(f"--sigma-rel: {sigma_rel} is not valid; it lies between 0 and 0.28")
    if out is None or not out.parent.is_dir():
        raise ConfigError(f"--out: {str(out)!r} is not valid; it names a .safetensors file in a folder that exists")
    found = [
        checkpoint.sized(checkpoint.folder_of(track, step))
        for track in sorted((stage_dir / "snapshots").glob("ema-*"))
        for step in checkpoint.steps(track)
    ]
    if not found:
        raise ConfigError(f"{stage_dir}: has no snapshots; set ema to power profiles and snapshot_every_nimg")
    steps, widths = [f.manifest["step"] for f in found], [f.manifest["sigma_rel"] for f in found]
    weights = ema.reconstruction_weights(steps, widths, max(steps), sigma_rel)
    first, total, moved = found[0].tensors("ema"), {}, set()
    for weight, snapshot in zip(weights, found):
        for name, tensor in snapshot.tensors("ema").items():
            part = tensor.double() * float(weight)
            total[name] = total[name] + part if name in total else part
            moved |= set() if torch.equal(tensor, first[name]) else {name}
    # what never moved is a constant of the network: taken as it is, free of the sum's rounding
    with files.by_rename(out) as temporary:
        save_tensors(temporary, {k: t.float() if k in moved else first[k] for k, t in total.items()})
    print(f"{out}: sigma_rel {sigma_rel} at step {max(steps)} from {len(found)} snapshots")
