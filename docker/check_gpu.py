"""Run while the gpu image is built, before and after our packages go in: NVIDIA's torch must stay, and what we need be there."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

NEEDED = ("flash_attn", "apex", "nvidia.dali", "torchvision", "triton", "deepspeed", "diffusers", "torch_fidelity")


def main(when: str, file: str) -> None:
    """`before` writes torch's version and place to `file`; `after` compares, and looks for the packages."""
    spec = importlib.util.find_spec("torch")
    torch = f"{importlib.metadata.version('torch')} {spec and spec.origin}"
    if when == "before":
        Path(file).write_text(torch, encoding="utf-8")
        return
    if torch != Path(file).read_text(encoding="utf-8"):
        sys.exit(f"torch was {Path(file).read_text(encoding='utf-8')}, now it is {torch}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"the image has no {', '.join(missing)}")
    print(f"torch {torch}; there are {', '.join(NEEDED)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
